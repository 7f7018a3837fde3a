//! The annotation of the demo that began it all (KubeCon 2022): `ebpf-resize: {"cname": "…", "commands": ["make"],
//! "resize": "{\"limits\": {\"memory\": \"5Gi\"}}"}`. A pod with it, and with none of ours, asks for as much.
//!
//! Which commands are executed does not matter here: growth is seen whoever causes it. It is of
//! memory limits alone: what policies say of requests and CPU holds in their own mode.

use std::collections::BTreeMap;

use bellows_core::pod::{CONTAINER, EBPF_RESIZE, MAX_MEMORY, MODE};
use serde::Deserialize;

#[derive(Deserialize)]
struct Annotation {
    cname: String,
    resize: String,
}

#[derive(Deserialize)]
struct Resize {
    limits: BTreeMap<String, String>,
}

/// Adds what the annotation asks for to a pod's annotations, in our words; returns whether it asks for anything.
///
/// # Errors
///
/// What is wrong with it, for people.
pub(super) fn understand(annotations: &mut BTreeMap<String, String>) -> Result<bool, String> {
    let own = [MODE, MAX_MEMORY, CONTAINER];
    if own.iter().any(|name| annotations.contains_key(*name)) {
        return Ok(false);
    }
    let Some(text) = annotations.get(EBPF_RESIZE) else {
        return Ok(false);
    };
    let annotation: Annotation = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let resize: Resize =
        serde_json::from_str(&annotation.resize).map_err(|error| format!("resize: {error}"))?;
    let memory = resize.limits.get("memory");
    let memory = memory.ok_or("resize has no limits.memory")?.clone();
    let ours = [
        (MODE, "Act".to_owned()),
        (CONTAINER, annotation.cname),
        (MAX_MEMORY, memory),
    ];
    annotations.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMO: &str = r#"{"cname":"kube-build-ctr","commands":["make"],"resize":"{\"requests\":{\"memory\":\"5Gi\"},\"limits\":{\"memory\":\"5Gi\"}}"}"#;

    fn understood(more: &[(&str, &str)]) -> Result<BTreeMap<String, String>, String> {
        let all = [(EBPF_RESIZE, DEMO)]
            .into_iter()
            .chain(more.iter().copied());
        let mut annotations = all
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let is_asked = understand(&mut annotations)?;
        assert_eq!(is_asked, more.is_empty());
        Ok(annotations)
    }

    #[test]
    fn the_demos_annotation_is_understood_and_ours_come_first() {
        let asked = understood(&[]).unwrap();
        assert_eq!(asked[MODE], "Act");
        assert_eq!(
            (&*asked[CONTAINER], &*asked[MAX_MEMORY]),
            ("kube-build-ctr", "5Gi")
        );
        for (name, value) in [(MODE, "Off"), (MAX_MEMORY, "1Gi"), (CONTAINER, "app")] {
            let asked = understood(&[(name, value)]).unwrap();
            assert_eq!(asked.len(), 2, "{asked:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        for (text, part) in [
            ("", "EOF"),
            ("{}", "cname"),
            (r#"{"cname":"a","resize":"5Gi"}"#, "resize:"),
            (
                r#"{"cname":"a","resize":"{\"limits\":{\"cpu\":\"4\"}}"}"#,
                "limits.memory",
            ),
        ] {
            let why = understood(&[(EBPF_RESIZE, text)]).unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
        }
    }
}
