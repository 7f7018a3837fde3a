//! What is shown to people is read as it is meant: by us, and by kubectl.

use std::collections::BTreeSet;

use super::{EXAMPLE, of_object, parse};

/// What is between fences of YAML in a document.
fn blocks(document: &'static str) -> Vec<&'static str> {
    let parts = document.split("```yaml\n").skip(1);
    parts
        .map(|part| part.split("```").next().unwrap())
        .collect()
}

const DOCUMENTS: [&str; 2] = [
    include_str!("../../../README.md"),
    include_str!("../../../docs/deploy.md"),
];

/// kubectl reads YAML 1.1, which takes some words for a truth value: `on` would be the field `true`, and `Off` no mode.
#[test]
fn no_example_has_a_word_that_yaml_1_1_takes_for_another() {
    const WORDS: [&str; 6] = ["on", "off", "yes", "no", "y", "n"];
    let examples = DOCUMENTS.into_iter().flat_map(blocks);
    let examples: Vec<&str> = examples.chain([EXAMPLE]).collect();
    assert!(examples.len() >= 4, "{examples:?}");
    for line in examples.iter().flat_map(|example| example.lines()) {
        // Who reads a comment writes what stands there.
        let is_off = |word: &str| word == "Off";
        let said = line.split_once(" #").map_or(line, |(said, _)| said);
        let split =
            |text: &'static str| text.split([' ', ',', ':', ';', '{', '}', '[', ']', '(', ')']);
        assert!(!split(line).any(is_off), "{line}");
        let is_bare = |word: &str| WORDS.contains(&word.to_lowercase().as_str());
        assert!(!split(said).any(is_bare), "{line}");
    }
}

/// Paths of all fields of a value.
fn fields(value: &serde_json::Value, at: &str, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                let at = format!("{at}.{name}");
                fields(value, &at, found);
                found.insert(at);
            }
        }
        serde_json::Value::Array(items) => {
            items.iter().for_each(|item| fields(item, at, found));
        }
        _ => {}
    }
}

#[test]
fn the_documents_have_policies_that_are_read_and_one_with_every_field_of_pods() {
    let policies = DOCUMENTS.into_iter().flat_map(blocks);
    let policies = policies.filter(|block| block.contains("kind: ElasticPolicy"));
    let mut most = BTreeSet::new();
    for block in policies {
        let document: serde_json::Value = serde_saphyr::from_str(block).unwrap();
        if let Some(namespace) = document["metadata"]["namespace"].as_str() {
            of_object("a", namespace, &document["spec"]).unwrap();
            fields(&document["spec"], "spec", &mut most);
        } else {
            parse(block).unwrap();
        }
    }
    let (_, example) = EXAMPLE.split_once(":\n").unwrap();
    let example: serde_json::Value = serde_saphyr::from_str(example).unwrap();
    let mut all = BTreeSet::new();
    fields(&example["spec"], "spec", &mut all);
    // A policy of the API has a namespace, and pods are lent no memory.
    for not in ["spec.selector.namespaces", "spec.containers.boosts.memory"] {
        assert!(all.remove(not), "{not}");
    }
    assert_eq!(most, all);
}
