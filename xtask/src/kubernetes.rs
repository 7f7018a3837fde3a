//! The binaries of Kubernetes, by release.
//!
//! The components are built from their Go module (there is no other source that every machine can
//! reach), etcd is Debian's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    debian,
    shell::{output, quiet, step},
    tools,
};

/// The release that the pod tier runs.
pub(crate) const VERSION: &str = "1.37.2";
/// What `--kubernetes` may name by its minor, and the releases that are meant: the first of the path that in-place resize
/// was announced with (its module is the last that can be built of 1.31), and the last that were out of each later one.
const RELEASES: [(&str, &str); 7] = [
    ("1.31", "1.31.0"),
    ("1.32", "1.32.13"),
    ("1.33", "1.33.13"),
    ("1.34", "1.34.4"),
    ("1.35", "1.35.4"),
    ("1.36", "1.36.3"),
    ("1.37", VERSION),
];
/// Executables on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    pub(crate) kubelet: PathBuf,
    pub(crate) apiserver: PathBuf,
    pub(crate) etcd: PathBuf,
}

/// What places pods and makes those of Deployments and StatefulSets, for the benches that need it.
#[derive(Clone, Debug)]
pub(crate) struct Controllers {
    pub(crate) scheduler: PathBuf,
    pub(crate) manager: PathBuf,
}

/// Builds or finds them.
pub(crate) fn controllers(release: &str) -> Result<Controllers> {
    let directory = tools::cache()?.join("kubernetes").join(release);
    let built = Controllers {
        scheduler: directory.join("kube-scheduler"),
        manager: directory.join("kube-controller-manager"),
    };
    fs::create_dir_all(&directory)?;
    build(release, &directory, &[&built.scheduler, &built.manager])?;
    Ok(built)
}

/// The release that is meant by a minor version, or by its own name.
pub(crate) fn release(version: &str) -> &str {
    let named = RELEASES.iter().find(|(minor, _)| *minor == version);
    named.map_or(version, |(_, release)| release)
}

/// How in-place resize is switched on in kubelet and API server alike, or off; `None` where it is so anyway.
pub(crate) fn gate(release: &str, is_on: bool) -> Result<Option<String>> {
    let minor = release.split('.').nth(1);
    let minor: u32 = minor
        .and_then(|minor| minor.parse().ok())
        .with_context(|| format!("`{release}` is no release of Kubernetes"))?;
    // Beta since 1.33, locked since 1.35.
    ensure!(
        is_on || minor < 35,
        "in-place resize cannot be switched off in Kubernetes {release}"
    );
    let is_so = is_on == (minor >= 33);
    Ok((!is_so).then(|| format!("InPlacePodVerticalScaling={is_on}")))
}

/// Builds or finds the components of a release.
pub(crate) fn binaries(release: &str) -> Result<Binaries> {
    let directory = tools::cache()?.join("kubernetes").join(release);
    let built = Binaries {
        kubelet: directory.join("kubelet"),
        apiserver: directory.join("kube-apiserver"),
        etcd: directory.join("etcd"),
    };
    fs::create_dir_all(&directory)?;
    // What it is unpacked to is every release's.
    let maker = tools::only_user(&tools::cache()?.join("etcd"))?;
    if !tools::is_intact(&built.etcd) {
        let executable = debian::file("etcd-server", "forky", "usr/bin/etcd")?;
        fs::copy(executable, &built.etcd)?;
        tools::seal(&built.etcd)?;
    }
    drop(maker);
    build(release, &directory, &[&built.kubelet, &built.apiserver])?;
    Ok(built)
}

/// Builds components that are not there, at once: the linker of each has one CPU to do.
fn build(release: &str, directory: &Path, components: &[&Path]) -> Result<()> {
    let _maker = tools::only_user(directory)?;
    let missing = components.iter().filter(|file| !tools::is_intact(file));
    let missing: Vec<&Path> = missing.copied().collect();
    let names = missing.iter().filter_map(|file| file.file_name()?.to_str());
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        return Ok(());
    }
    tools::go()?;
    let what = format!("build {} {release} (minutes, once)", names.join(" and "));
    step(&what, || {
        let module = directory.join("module");
        fs::create_dir_all(&module)?;
        if !module.join("go.sum").exists() {
            write_module(release, &module)?;
        }
        let flags = format!("-s -w -X k8s.io/component-base/version.gitVersion=v{release}");
        let mut command = go(&module);
        command
            .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(directory);
        let packages = names
            .iter()
            .map(|name| format!("k8s.io/kubernetes/cmd/{name}"));
        quiet(command.args(packages))?;
        missing.iter().try_for_each(|file| tools::seal(file))
    })
}

fn go(module: &Path) -> Command {
    let mut command = Command::new("go");
    command
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", "auto")
        .env("GOFLAGS", "-mod=mod");
    command
}

/// A module that requires Kubernetes and replaces its staging modules by their releases.
fn write_module(release: &str, module: &Path) -> Result<()> {
    fs::write(
        module.join("go.mod"),
        "module bellows.dev/kubernetes\n\ngo 1.26\n",
    )?;
    let download = output(go(module).args([
        "mod",
        "download",
        "-json",
        &format!("k8s.io/kubernetes@v{release}"),
    ]))?;
    let download: Value = serde_json::from_str(&download)?;
    let source = download["Dir"]
        .as_str()
        .context("go mod download names no directory")?;
    let manifest = fs::read_to_string(Path::new(source).join("go.mod"))?;
    let staging = "=> ./staging/src/k8s.io/";
    let mut names: Vec<&str> = manifest
        .lines()
        .filter_map(|line| line.split_once(staging))
        .map(|(_, name)| name.trim())
        .collect();
    names.sort_unstable();
    names.dedup();
    let minor = release.strip_prefix("1.").context("a version 1.x")?;
    let replaces: String = names
        .iter()
        .map(|name| format!("replace k8s.io/{name} => k8s.io/{name} v0.{minor}\n"))
        .collect();
    let go_mod = format!(
        "module bellows.dev/kubernetes\n\ngo 1.26\n\nrequire k8s.io/kubernetes v{release}\n\n{replaces}"
    );
    fs::write(module.join("go.mod"), go_mod)?;
    let imports = "//go:build tools\n\npackage tools\n\nimport (\n\t_ \"k8s.io/kubernetes/cmd/kube-apiserver\"\n\t_ \"k8s.io/kubernetes/cmd/kube-controller-manager\"\n\t_ \"k8s.io/kubernetes/cmd/kube-scheduler\"\n\t_ \"k8s.io/kubernetes/cmd/kubelet\"\n)\n";
    fs::write(module.join("tools.go"), imports)?;
    quiet(go(module).args(["mod", "tidy", "-e"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is filed as a run without in-place resize was one.
    #[test]
    fn resize_is_switched_on_and_off_where_it_is_not_so_anyway() {
        let of = |release, is_on| gate(release, is_on).unwrap();
        for release in ["1.27.1", "1.32.13"] {
            assert_eq!(of(release, false), None);
            let on = of(release, true);
            assert_eq!(on.as_deref(), Some("InPlacePodVerticalScaling=true"));
        }
        for release in ["1.33.13", "1.34.4"] {
            assert_eq!(of(release, true), None);
            let off = of(release, false);
            assert_eq!(off.as_deref(), Some("InPlacePodVerticalScaling=false"));
        }
        assert_eq!(of("1.35.4", true), None);
        gate("1.35.4", false).unwrap_err();
        gate("latest", true).unwrap_err();
    }
}
