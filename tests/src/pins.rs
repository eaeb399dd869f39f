//! What an ambassador has pinned in a place: maps of the kernel, as bpftool shows them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::place::{BPFFS, Place};
use crate::process::run;
use crate::wait::SOON;

/// A pinned map.
#[derive(Debug)]
pub struct Map {
    place: Place,
    pin: PathBuf,
}

impl Map {
    /// All that are pinned in this place.
    pub fn all(place: &Place) -> Result<Vec<Self>> {
        let found = run(place.command("find").args([BPFFS, "-path", "*/maps/*"]), SOON)?;
        Ok(found.lines().map(|pin| Self { place: place.clone(), pin: pin.into() }).collect())
    }

    /// The one of this name, of the only ambassador of this place.
    pub fn named(place: &Place, name: &str) -> Result<Self> {
        let map = Self::all(place)?.into_iter().find(|map| map.name() == name);
        map.with_context(|| format!("find the map {name}"))
    }

    /// How many entries each has that is pinned in this place; of those only whose length says something: an array never
    /// grows, and in others what is the oldest makes room by itself.
    pub fn entries(place: &Place) -> Result<BTreeMap<String, usize>> {
        let mut entries = BTreeMap::new();
        for map in Self::all(place)? {
            if map.kind()? == "hash" {
                entries.insert(map.name(), map.values()?.len());
            }
        }
        Ok(entries)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.pin.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its kind, such as `hash`.
    pub fn kind(&self) -> Result<String> {
        let told = self.bpftool("show", &[])?;
        Ok(told["type"].as_str().context("find a map's type")?.to_owned())
    }

    /// All values.
    pub fn values(&self) -> Result<Vec<Vec<u8>>> {
        let told = self.bpftool("dump", &[])?;
        told.as_array().context("find a map's elements")?.iter().map(value).collect()
    }

    /// An element of an array.
    pub fn element(&self, index: u32) -> Result<Vec<u8>> {
        let key = index.to_ne_bytes().map(|byte| byte.to_string());
        let words: Vec<_> = ["key"].into_iter().chain(key.iter().map(String::as_str)).collect();
        value(&self.bpftool("lookup", &words)?)
    }

    fn bpftool(&self, verb: &str, words: &[&str]) -> Result<Value> {
        let pin: &Path = &self.pin;
        let mut command = self.place.command("bpftool");
        command.args(["-j", "map", verb, "pinned"]).arg(pin).args(words);
        serde_json::from_str(&run(&mut command, SOON)?).context("parse what bpftool says")
    }
}

fn value(element: &Value) -> Result<Vec<u8>> {
    let bytes = element["value"].as_array().context("find an element's bytes")?;
    let byte = |byte: &Value| -> Result<u8> {
        let text = byte.as_str().and_then(|it| it.strip_prefix("0x")).context("read a byte")?;
        u8::from_str_radix(text, 16).context("parse a byte")
    };
    bytes.iter().map(byte).collect()
}
