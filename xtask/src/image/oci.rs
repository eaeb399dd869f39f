//! An OCI image of one layer in an archive, as podman, containerd and skopeo read it
//! (<https://github.com/opencontainers/image-spec/blob/main/image-layout.md>). Nothing in it depends on
//! when or by whom it is written.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

pub(super) struct Image {
    /// What it is called where it is loaded.
    pub(super) name: String,
    /// As Go names it.
    pub(super) architecture: &'static str,
    pub(super) files: Vec<Entry>,
    pub(super) user: &'static str,
    pub(super) entrypoint: &'static [&'static str],
    pub(super) command: &'static [&'static str],
    pub(super) labels: Vec<(&'static str, String)>,
}

pub(super) struct Entry {
    pub(super) path: &'static str,
    pub(super) mode: u32,
    pub(super) bytes: Vec<u8>,
}

impl Image {
    /// Returns the digest of its manifest.
    pub(super) fn write(&self, out: &Path) -> Result<String> {
        let layer = layer(&self.files).context("pack the layer")?;
        let (packed, unpacked) = (compressed(&layer)?, digest(&layer));
        let labels: Value =
            self.labels.iter().map(|(key, text)| ((*key).to_owned(), json!(text))).collect();
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "User": self.user,
                "Entrypoint": self.entrypoint,
                "Cmd": self.command,
                // For people who type a name into `kubectl exec`.
                "Env": ["PATH=/"],
                "Labels": labels,
            },
            "rootfs": { "type": "layers", "diff_ids": [unpacked] },
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(LAYER, &packed)],
            "annotations": labels,
        });
        let manifest = manifest.to_string().into_bytes();
        let mut described = descriptor(MANIFEST, &manifest);
        described["platform"] = json!({ "architecture": self.architecture, "os": "linux" });
        described["annotations"] = json!({ "org.opencontainers.image.ref.name": self.name });
        let index = json!({ "schemaVersion": 2, "manifests": [described] }).to_string();

        let mut archive = Builder::new(BufWriter::new(File::create(out)?));
        add(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add(&mut archive, "index.json", 0o644, index.as_bytes())?;
        for blob in [&manifest, &config, &packed] {
            add(&mut archive, &format!("blobs/{}", digest(blob).replace(':', "/")), 0o644, blob)?;
        }
        archive.into_inner()?.flush()?;
        Ok(digest(&manifest))
    }
}

/// The file system: the files, and the directories that they are in.
fn layer(files: &[Entry]) -> io::Result<Vec<u8>> {
    let mut layer = Builder::new(Vec::new());
    let mut made = Vec::new();
    for file in files {
        for (end, _) in file.path.match_indices('/') {
            let directory = &file.path[..=end];
            if !made.contains(&directory) {
                made.push(directory);
                let mut header = header(0o755, 0);
                header.set_entry_type(EntryType::Directory);
                layer.append_data(&mut header, directory, io::empty())?;
            }
        }
        add(&mut layer, file.path, file.mode, &file.bytes)?;
    }
    layer.into_inner()
}

fn add(archive: &mut Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(mode, bytes.len() as u64), path, bytes)
}

/// Of root, and of no time.
fn header(mode: u32, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_mode(mode);
    header.set_size(size);
    header
}

fn compressed(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut packed: GzEncoder<Vec<u8>> = GzBuilder::new().write(Vec::new(), Compression::best());
    packed.write_all(bytes)?;
    packed.finish()
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": kind, "digest": digest(bytes), "size": bytes.len() })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        Image {
            name: "localhost/it:1".into(),
            architecture: "amd64",
            files: vec![
                Entry { path: "program", mode: 0o755, bytes: vec![7; 3000] },
                Entry { path: "etc/a/one", mode: 0o644, bytes: vec![1] },
                Entry { path: "etc/a/two", mode: 0o644, bytes: vec![2] },
            ],
            user: "1:1",
            entrypoint: &["/program"],
            command: &[],
            labels: vec![("label", "text".into())],
        }
    }

    #[test]
    fn each_directory_is_there_once_and_before_its_files() -> Result<()> {
        let layer = layer(&image().files)?;
        let mut archive = tar::Archive::new(&layer[..]);
        let paths = archive.entries()?.map(|it| Ok(it?.path()?.to_string_lossy().into_owned()));
        let paths = paths.collect::<Result<Vec<_>>>()?;
        assert_eq!(paths, ["program", "etc/", "etc/a/", "etc/a/one", "etc/a/two"]);
        Ok(())
    }

    #[test]
    fn the_same_image_has_the_same_bytes() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let [one, other] = ["one", "other"].map(|name| directory.path().join(name));
        assert_eq!(image().write(&one)?, image().write(&other)?);
        assert_eq!(std::fs::read(one)?, std::fs::read(other)?);
        Ok(())
    }
}
