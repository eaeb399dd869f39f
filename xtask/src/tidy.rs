//! The house rules that no compiler knows, each a function that adds what it finds wrong.
//!
//! The code map in `README.md` is the section whose heading says "Code map". It names a file by
//! its path from the workspace's root; a brace list stands for several, as in a shell:
//! `ambassador-user/src/proxy/{splice,copy}.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use ambassador::privileges;
use anyhow::{Context, Result, bail, ensure};

use crate::command::{cargo, stdout_of};
use crate::workspace::{self, host_triple};

/// A file longer than this states its reason in its header, in a sentence with [`REASON`].
const LONG: usize = 400;
const REASON: &str = "Long because";

/// The largest file that belongs in the repository.
const LARGE: u64 = 1 << 20;

/// Checks every rule, shows everything that is wrong, and fails if anything is.
pub(crate) fn run() -> Result<()> {
    let files = files()?;
    let sources: Vec<_> = files
        .iter()
        .filter(|path| path.ends_with(".rs"))
        .map(|path| Source::read(path))
        .collect::<Result<_>>()?;
    ensure!(!sources.is_empty(), "found no source files to check");

    let mut wrong = Vec::new();
    for source in &sources {
        header_and_length(source, &mut wrong);
        only_the_datapath_knows_aya(source, &mut wrong);
    }
    code_map(&sources, &mut wrong)?;
    file_sizes(&files, &mut wrong)?;
    inherited_lints(&mut wrong)?;
    no_kernel_crates_on_the_host(&mut wrong)?;
    granted_capabilities(&files, &mut wrong)?;

    for problem in &wrong {
        eprintln!("tidy: {problem}");
    }
    if !wrong.is_empty() {
        bail!("{} house rules broken", wrong.len());
    }
    eprintln!("{} files, {} of them sources: tidy", files.len(), sources.len());
    Ok(())
}

/// A Rust file, by its path from the workspace's root.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn read(path: &str) -> Result<Self> {
        let text = fs::read_to_string(workspace::root().join(path))
            .with_context(|| format!("read {path}"))?;
        Ok(Self { path: path.to_owned(), text })
    }

    /// The comment that the file begins with.
    fn header(&self) -> impl Iterator<Item = &str> {
        self.text.lines().map_while(|line| line.strip_prefix("//!"))
    }
}

/// Every file that is in the repository or would be after `git add`.
fn files() -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(workspace::root());
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let listed = stdout_of(&mut git).context("list the files of the repository")?;
    let exists = |path: &&str| !path.is_empty() && workspace::root().join(path).is_file();
    Ok(listed.split('\0').filter(exists).map(str::to_owned).collect())
}

fn header_and_length(source: &Source, wrong: &mut Vec<String>) {
    let Source { path, text } = source;
    if path.ends_with("/mod.rs") {
        wrong.push(format!("{path}: a module lies in `name.rs` beside `name/`, not in `mod.rs`"));
    }
    if source.header().next().is_none() {
        wrong.push(format!("{path}: does not begin with a `//!` comment that says what it is for"));
    }
    let lines = text.lines().count();
    if lines > LONG && !source.header().any(|line| line.contains(REASON)) {
        wrong.push(format!("{path}: {lines} lines, and no \"{REASON} ...\" in its header"));
    }
}

fn only_the_datapath_knows_aya(source: &Source, wrong: &mut Vec<String>) {
    let Source { path, text } = source;
    let outside = path.starts_with("ambassador-user/src/")
        && !path.starts_with("ambassador-user/src/datapath");
    if outside && (text.contains("aya::") || text.contains("use aya")) {
        wrong.push(format!("{path}: knows aya, which only `datapath` may"));
    }
}

fn code_map(sources: &[Source], wrong: &mut Vec<String>) -> Result<()> {
    let readme = workspace::root().join("README.md");
    if !readme.is_file() {
        wrong.push("README.md: is missing, and with it the code map".to_owned());
        return Ok(());
    }
    let readme = fs::read_to_string(readme).context("read README.md")?;
    let mapped = mapped_files(&readme);
    let sources: BTreeSet<_> = sources
        .iter()
        .map(|source| source.path.as_str())
        .filter(|path| path.split('/').nth(1) == Some("src"))
        .collect();
    for path in &sources {
        if !mapped.contains(*path) {
            wrong.push(format!("README.md: its code map lacks {path}"));
        }
    }
    for path in mapped.iter().filter(|path| !workspace::root().join(path).is_file()) {
        wrong.push(format!("README.md: its code map names {path}, which is not there"));
    }
    Ok(())
}

/// The paths of Rust files in the section about the code map.
fn mapped_files(readme: &str) -> BTreeSet<String> {
    let heading = |line: &&str| line.starts_with('#');
    readme
        .lines()
        .skip_while(|line| !(heading(line) && line.to_lowercase().contains("code map")))
        .skip(1)
        .take_while(|line| !heading(line))
        .flat_map(|line| line.split([' ', '`', '|', '(', ')', '[', ']']))
        .map(|word| word.trim_end_matches([',', ';', ':', '.']))
        .filter(|word| word.contains('/') && word.ends_with(".rs"))
        .flat_map(expanded)
        .collect()
}

/// What a word with brace lists stands for.
fn expanded(word: &str) -> Vec<String> {
    let Some((before, rest)) = word.split_once('{') else { return vec![word.to_owned()] };
    let Some((list, after)) = rest.split_once('}') else { return vec![word.to_owned()] };
    list.split(',').flat_map(|item| expanded(&format!("{before}{item}{after}"))).collect()
}

fn file_sizes(files: &[String], wrong: &mut Vec<String>) -> Result<()> {
    for path in files {
        let size = fs::metadata(workspace::root().join(path))
            .with_context(|| format!("read the size of {path}"))?
            .len();
        if size > LARGE {
            wrong.push(format!("{path}: {size} bytes are too many for a repository"));
        }
    }
    Ok(())
}

fn inherited_lints(wrong: &mut Vec<String>) -> Result<()> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value =
        serde_json::from_str(&stdout_of(&mut metadata)?).context("read cargo's metadata")?;
    let packages = metadata["packages"].as_array().context("list the workspace's packages")?;
    ensure!(!packages.is_empty(), "found no packages to check");
    for package in packages {
        let manifest = package["manifest_path"].as_str().context("find a package's manifest")?;
        let text = fs::read_to_string(manifest).with_context(|| format!("read {manifest}"))?;
        if !text.contains("[lints]\nworkspace = true") {
            let name = Path::new(manifest).strip_prefix(workspace::root());
            let name = name.unwrap_or(Path::new(manifest)).display();
            wrong.push(format!("{name}: does not inherit the workspace's lints"));
        }
    }
    Ok(())
}

/// aya-ebpf exports its own, slow, memcpy and memset, which would replace the host's.
fn no_kernel_crates_on_the_host(wrong: &mut Vec<String>) -> Result<()> {
    let mut tree = cargo();
    tree.args(["tree", "--package", "ambassador-user", "--edges", "normal", "--prefix", "none"]);
    tree.args(["--target", &host_triple()?]);
    let tree = stdout_of(&mut tree)?;
    ensure!(tree.starts_with("ambassador-user "), "found no dependencies to check");
    if tree.lines().any(|line| line.starts_with("aya-ebpf ")) {
        wrong.push("ambassador-user: depends on aya-ebpf, which is for the BPF target".to_owned());
    }
    Ok(())
}

/// What `deploy/` grants is what `privileges.rs` says is used, and nothing else.
fn granted_capabilities(files: &[String], wrong: &mut Vec<String>) -> Result<()> {
    let names = |all: &[&[_]]| -> BTreeSet<String> {
        all.concat().iter().map(ToString::to_string).collect()
    };
    let accelerated = names(&[&privileges::TO_LOAD, &[privileges::TO_TRACE]]);
    let loader = names(&[&privileges::TO_LOAD, &[privileges::TO_TRACE], &privileges::TO_HAND_OVER]);
    let manifests = files.iter().filter(|it| it.starts_with("deploy/") && it.ends_with(".yaml"));
    let mut seen = 0;
    for path in manifests {
        seen += 1;
        let used = match path.as_str() {
            "deploy/component/accelerated/sidecar.yaml" => &accelerated,
            "deploy/component/loader/sidecar.yaml" => &loader,
            _ => &BTreeSet::new(),
        };
        let text = fs::read_to_string(workspace::root().join(path))
            .with_context(|| format!("read {path}"))?;
        let granted = granted(&text);
        if &granted != used {
            wrong.push(format!("{path}: grants {granted:?}, and privileges.rs says {used:?}"));
        }
    }
    ensure!(seen > 0, "found no manifests to check");
    Ok(())
}

/// The capabilities that a manifest adds, as lists in either form.
fn granted(manifest: &str) -> BTreeSet<String> {
    let mut lines = manifest.lines().map(str::trim).peekable();
    let mut granted = BTreeSet::new();
    while let Some(line) = lines.next() {
        let Some((_, list)) = line.split_once("add:") else { continue };
        let inline = list.trim().trim_start_matches('[').split([',', ']', '}', ' ']);
        let mut names: Vec<_> = inline.filter(|name| !name.is_empty()).collect();
        while let Some(item) = lines.next_if(|line| line.starts_with("- ")) {
            names.extend(item.split(' ').nth(1));
        }
        granted.extend(names.iter().map(|name| format!("CAP_{name}")));
    }
    granted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_found_in_either_form() {
        let listed = "capabilities:\n  drop: [ALL]\n  add:\n    - BPF # why\n    - NET_ADMIN\nseccompProfile: x\n";
        let inline = "capabilities: { drop: [ALL], add: [BPF, NET_ADMIN] }\n";
        for manifest in [listed, inline] {
            let found: Vec<_> = granted(manifest).into_iter().collect();
            assert_eq!(found, ["CAP_BPF", "CAP_NET_ADMIN"], "{manifest}");
        }
        assert!(granted("drop: [ALL]\n- NET_RAW\n").is_empty());
    }

    #[test]
    fn a_brace_list_stands_for_several_files() {
        assert_eq!(expanded("a/{b,c}.rs"), ["a/b.rs", "a/c.rs"]);
        assert_eq!(expanded("{a,b}/{c,d}.rs"), ["a/c.rs", "a/d.rs", "b/c.rs", "b/d.rs"]);
    }

    #[test]
    fn only_the_code_map_names_files() {
        let readme = "# x\n`a/src/no.rs`\n## Code map\n| `a/src/{b,c}.rs` | does |\n\
                      a/src/d.rs, and more\n## Next\na/src/no.rs\n";
        let mapped: Vec<_> = mapped_files(readme).into_iter().collect();
        assert_eq!(mapped, ["a/src/b.rs", "a/src/c.rs", "a/src/d.rs"]);
    }
}
