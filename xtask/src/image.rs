//! `cargo xtask image`: the container image, made without a daemon.
//!
//! One archive that is an OCI image layout and a docker archive at once: `ctr images import`, `skopeo copy
//! oci-archive:` and `docker load` take it. There is nothing in the image but the static binary. The same binary gives
//! the same bytes: all times are zero, all owners root, and nothing is compressed.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    build, root,
    shell::{quiet, step},
    tools,
};

#[derive(Args)]
pub(crate) struct Options {
    /// What the image is called.
    #[arg(long, default_value = "bellows.dev/agent:dev")]
    name: String,
    /// Take this static binary instead of building one.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

const ARCHIVE: &str = "target/image/bellows.tar";
const EPOCH: &str = "1970-01-01T00:00:00Z";

/// Writes the archive.
pub(crate) fn command(options: &Options) -> Result<bool> {
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => build::binaries()?.bellows,
    };
    let archive = root()?.join(ARCHIVE);
    let digest = step("make the image", || write(&binary, &options.name, &archive))?;
    println!("{} in {ARCHIVE}: {digest}", options.name);
    Ok(true)
}

/// Writes an image of a binary; returns the digest of its manifest.
fn write(binary: &Path, name: &str, archive: &Path) -> Result<String> {
    let (repository, tag) = parts(name)?;
    let directory = archive.with_extension("parts");
    drop(fs::remove_dir_all(&directory));
    let (files, layout) = (directory.join("root"), directory.join("layout"));
    fs::create_dir_all(&files)?;
    fs::create_dir_all(&layout)?;
    let own = files.join("bellows");
    fs::copy(binary, &own).with_context(|| binary.display().to_string())?;
    fs::set_permissions(own, Permissions::from_mode(0o755))?;
    let layer = directory.join("layer.tar");
    pack(&files, &["bellows"], &layer)?;
    let blobs = Blobs(layout.join("blobs/sha256"));
    let layer = blobs.add("application/vnd.oci.image.layer.v1.tar", &fs::read(layer)?)?;
    let config = json!({
        "created": EPOCH,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            // Cgroups are root's. What root may do is for the pod to say.
            "User": "0:0",
            "Entrypoint": ["/bellows"],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": "bellows",
                "org.opencontainers.image.description": "Lets containers breathe",
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.version": tag,
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        "history": [{ "created": EPOCH, "created_by": "cargo xtask image" }],
    });
    let kind = "application/vnd.oci.image.config.v1+json";
    let config = blobs.add(kind, config.to_string().as_bytes())?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer],
    });
    let mut manifest = blobs.add(kind, manifest.to_string().as_bytes())?;
    let digest = manifest["digest"].as_str().context("no digest")?.to_owned();
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    manifest["annotations"] = json!({
        "io.containerd.image.name": format!("{repository}:{tag}"),
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    let docker = json!([{
        "Config": blob(&config)?,
        "RepoTags": [format!("{repository}:{tag}")],
        "Layers": [blob(&layer)?],
    }]);
    for (file, value) in [
        ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
        ("index.json", index),
        ("manifest.json", docker),
    ] {
        fs::write(layout.join(file), value.to_string())?;
    }
    let files = ["oci-layout", "index.json", "manifest.json", "blobs"];
    pack(&layout, &files, archive)?;
    fs::remove_dir_all(directory)?;
    Ok(digest)
}

/// A name without its tag, and the tag.
fn parts(name: &str) -> Result<(&str, &str)> {
    let (repository, tag) = name
        .rsplit_once(':')
        .filter(|(_, tag)| !tag.contains('/'))
        .context("the name of an image has a tag, such as :dev")?;
    ensure!(
        repository.contains('/') && !repository.contains('@') && !tag.is_empty(),
        "no name of an image: {name}; write one such as bellows.dev/agent:dev"
    );
    Ok((repository, tag))
}

/// Packs files so that the same files give the same bytes.
fn pack(directory: &Path, files: &[&str], archive: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command
        .args(["--format=ustar", "--sort=name", "--mtime=@0"])
        .args(["--owner=0", "--group=0", "--numeric-owner"])
        .args(["--mode=u=rwX,go=rX", "--directory"])
        .arg(directory)
        .arg("--file")
        .arg(archive)
        .arg("--create")
        .args(files);
    quiet(&mut command)
}

/// The blobs of a layout, by their digests.
struct Blobs(PathBuf);

impl Blobs {
    /// Adds one; returns its descriptor.
    fn add(&self, kind: &str, bytes: &[u8]) -> Result<Value> {
        fs::create_dir_all(&self.0)?;
        let sum = tools::sha256(bytes)?;
        fs::write(self.0.join(&sum), bytes)?;
        let size = bytes.len();
        Ok(json!({ "mediaType": kind, "digest": format!("sha256:{sum}"), "size": size }))
    }
}

/// Where a blob is in the layout.
fn blob(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"].as_str().context("no digest")?;
    Ok(format!("blobs/{}", digest.replace(':', "/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of an image of a file with these bytes, made in a directory of its own.
    fn made(name: &str, bytes: &[u8]) -> (String, Vec<u8>) {
        let directory =
            std::env::temp_dir().join(format!("bellows-image-{}-{name}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let binary = directory.join(name);
        fs::write(&binary, bytes).unwrap();
        let archive = directory.join("image.tar");
        let digest = write(&binary, "bellows.dev/agent:dev", &archive).unwrap();
        let archive = fs::read(archive).unwrap();
        fs::remove_dir_all(directory).unwrap();
        (digest, archive)
    }

    #[test]
    fn the_same_binary_gives_the_same_image() {
        let first = made("one", b"a binary");
        // Times are seconds.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert!(first == made("another", b"a binary"));
        assert_ne!(first.0, made("one", b"another binary").0);
    }

    #[test]
    fn a_name_has_a_place_and_a_tag() {
        assert_eq!(parts("a.b:5000/c/d:1.0").unwrap(), ("a.b:5000/c/d", "1.0"));
        for wrong in [
            "agent",
            "a.b/agent",
            "a.b:5000/agent",
            "agent:dev",
            "a.b/agent:",
            "a/b@sha256:0",
        ] {
            assert!(parts(wrong).is_err(), "{wrong}");
        }
    }
}
