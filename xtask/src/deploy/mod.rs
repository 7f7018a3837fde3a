//! What is installed in a cluster: generated from the chart, and checked.
//!
//! The chart (`deploy/chart`) is the one source. The manifest without Helm, and the copies of it that the overlays
//! build upon, are generated and checked in; their first lines tell checksums, by which the unit tier sees without
//! Helm that one was changed without the other. Helm and kustomize are built from their Go modules, so whatever needs
//! them is left to `codegen` and to the tier `deploy`.

mod installed;
mod tier;

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{root, shell::output, tools};
pub(crate) use tier::tier;

const HELM: &str = "4.3.1";
const KUSTOMIZE: &str = "5.8.1";

const CHART: &str = "deploy/chart";
/// What the manifest is rendered with.
const RENDERED: &str = "deploy/chart/ci/rendered.yaml";
/// Resource definitions, by their files.
const DEFINITIONS: &str = "deploy/chart/crds";
const POLICIES: &str = "elasticpolicies.yaml";
const NODES: &str = "elasticnodes.yaml";
const NAMESPACE: &str = "bellows";
/// Where each generated file goes; the base of the overlays has a copy.
const PLACES: [&str; 2] = ["deploy", "deploy/kustomize/base"];

const ABOUT: &str = "\
# Bellows on every node: `kubectl apply -f deploy/elasticpolicies.yaml -f deploy/elasticnodes.yaml -f
# deploy/bellows.yaml`. Pods opt in by policies or annotations. How to take it away, and what else there is to know: docs/deploy.md.
#
# For Kubernetes 1.32 and later; for 1.30 and 1.31 the chart renders another admission policy.
#
# Where `system-node-critical` is for kube-system only, add a ResourceQuota for it to the namespace, or take it out.
";

fn helm() -> Result<PathBuf> {
    tools::go_program("helm", HELM, "helm.sh/helm/v4/cmd/helm")
}

fn kustomize() -> Result<PathBuf> {
    tools::go_program("kustomize", KUSTOMIZE, "sigs.k8s.io/kustomize/kustomize/v5")
}

/// Generates what is checked in, or tells whether it is what would be generated.
pub(crate) fn codegen(check: bool) -> Result<bool> {
    let generated = [
        ("bellows.yaml", manifest()?),
        (POLICIES, definition(POLICIES)?),
        (NODES, definition(NODES)?),
    ];
    let mut is_same = true;
    for place in PLACES {
        for (name, text) in &generated {
            let file = format!("{place}/{name}");
            let path = root()?.join(&file);
            if !check {
                fs::write(&path, text)?;
            } else if fs::read_to_string(&path).ok().as_ref() != Some(text) {
                eprintln!("{file} is not what {CHART} gives: run `cargo xtask codegen`");
                is_same = false;
            }
        }
    }
    Ok(is_same)
}

/// A resource definition.
fn definition(name: &str) -> Result<String> {
    let file = format!("{DEFINITIONS}/{name}");
    let text = fs::read_to_string(root()?.join(&file))?;
    Ok(format!(
        "# Generated from {file} by `cargo xtask codegen`.\n{text}"
    ))
}

/// All else, as the chart gives it.
fn manifest() -> Result<String> {
    let rendered = template(NAMESPACE, &["--no-hooks", "--values", RENDERED])?;
    let mut documents = documents(&rendered);
    // The agent comes last: by then it may do what it must, and nothing else.
    documents.sort_by_key(|document| document.contains("\nkind: DaemonSet\n"));
    let text = format!("{ABOUT}{}\n", documents.join("\n---\n"));
    Ok(format!("{}{text}", header(&chart_sum()?, &sum(&text)?)))
}

/// The first lines of the manifest.
fn header(chart: &str, rest: &str) -> String {
    format!("# Generated from {CHART} by `cargo xtask codegen`.\n# {chart} {rest}\n")
}

/// The documents of a rendered chart, without the names of their templates.
fn documents(rendered: &str) -> Vec<String> {
    let all = rendered.split("---\n# Source: ").map(|document| {
        let (_template, text) = document.split_once('\n').unwrap_or_default();
        text.trim().to_owned()
    });
    all.filter(|document| !document.is_empty()).collect()
}

fn template(namespace: &str, options: &[&str]) -> Result<String> {
    let mut command = Command::new(helm()?);
    command.args(["template", "bellows", CHART, "--namespace", namespace]);
    output(command.args(options).current_dir(root()?))
}

/// A checksum of all that the manifest is made from, the options included.
fn chart_sum() -> Result<String> {
    let mut files = vec![root()?.join(RENDERED)];
    for part in ["Chart.yaml", "values.yaml", ".helmignore"] {
        files.push(root()?.join(CHART).join(part));
    }
    let templates = fs::read_dir(root()?.join(CHART).join("templates"))?;
    for template in templates {
        files.push(template?.path());
    }
    files.sort();
    let mut all = String::new();
    for file in files {
        let name = file.file_name().and_then(|name| name.to_str());
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        all.push_str(name.context("a file has a name")?);
        all.push('\n');
        all.push_str(&text);
    }
    sum(&all)
}

/// Enough of a checksum to see a change.
fn sum(text: &str) -> Result<String> {
    Ok(tools::sha256(text.as_bytes())?.chars().take(16).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Before 1.33 a policy of resizing can be changed where in-place resize is on (kubernetes/kubernetes#130183): to a
    /// restart, by whoever has the agent's token.
    #[test]
    fn an_agent_of_an_old_cluster_cannot_change_how_containers_are_resized() {
        let path = root().unwrap().join(CHART).join("templates/admission.yaml");
        let template = fs::read_to_string(path).unwrap();
        let old = template
            .split_once("{{- else }}\n  # A resize is an update")
            .unwrap()
            .1;
        let (old, _) = old.split_once("{{- end }}").unwrap();
        for side in ["object", "oldObject"] {
            let all = format!(
                "\n      {side}.spec.containers.map(container, container.?resizePolicy.orValue([]))"
            );
            assert!(old.contains(&all), "{old}");
        }
    }

    #[test]
    fn what_is_generated_is_of_this_chart() {
        let read = |file: String| fs::read_to_string(root().unwrap().join(file)).unwrap();
        let [original, copy] = PLACES;
        let manifest = read(format!("{original}/bellows.yaml"));
        let rest = manifest.splitn(3, '\n').last().unwrap();
        let header = header(&chart_sum().unwrap(), &sum(rest).unwrap());
        let again = "change the chart, and run `cargo xtask codegen`";
        assert!(manifest.starts_with(&header), "{again}");
        for name in [POLICIES, NODES] {
            let text = read(format!("{original}/{name}"));
            assert!(text == definition(name).unwrap(), "{again}");
        }
        for name in ["bellows.yaml", POLICIES, NODES] {
            let same = read(format!("{original}/{name}")) == read(format!("{copy}/{name}"));
            assert!(same, "{copy}/{name}: {again}");
        }
    }
}
