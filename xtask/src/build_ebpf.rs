//! `cargo xtask build-ebpf`: the kernel half, as an object for the user half to embed.

mod verifier;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use object::build::elf::{Builder, SectionData};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind, SymbolScope, elf};

use crate::artifact::{self, Artifact};
use crate::command::{self, step};
use crate::toolchain::{Target, Toolchain};
use crate::workspace;

/// Every eBPF instruction takes eight bytes, or is counted as two.
const INSTRUCTION: u64 = 8;

/// Builds with the toolchain that is there.
pub(crate) fn run(target: &Target) -> Result<()> {
    let toolchain = Toolchain::find()
        .context("no eBPF toolchain here; install one with `cargo xtask setup`")?;
    build(&toolchain, target).map(drop)
}

/// The instructions of each program, and of each function that they share.
pub(crate) type Lengths = Vec<(String, u64)>;

/// Builds the object, puts it where the user half looks for it, and says what it holds.
pub(crate) fn build(toolchain: &Toolchain, target: &Target) -> Result<Lengths> {
    let root = workspace::root();
    step(&format!("build the eBPF object for {}", target.name()));
    // Taken before the build, so that an edit made meanwhile makes the object stale.
    let fingerprint = artifact::fingerprint(root).context("fingerprint the eBPF sources")?;
    command::run(&mut toolchain.cargo("build", target)).with_context(|| {
        format!("build the eBPF object (the linker must know LLVM {})", toolchain.compiler.llvm())
    })?;

    let built = root.join("target/ebpf").join(target.triple()).join("bpf/ambassador-ebpf");
    let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    let bytes = without_dwarf(&bytes).context("take the debug information out of the object")?;
    let programs = programs(&bytes).context("read the eBPF object")?;
    ensure!(!programs.is_empty(), "the eBPF object holds no programs");

    let artifact = Artifact::of(root, &target.name());
    fs::create_dir_all(artifact::directory(root)).context("create the directory of the object")?;
    write_if_changed(&artifact.object, &bytes)?;
    write_if_changed(&artifact.fingerprint, fingerprint.as_bytes())?;

    let Artifact { object, .. } = artifact;
    println!("{}: {} bytes, sha256 {}", object.display(), bytes.len(), artifact::digest(&bytes));
    let verified = if target.name() == Target::host().name() {
        verifier::statistics(&bytes)
    } else {
        Err(anyhow!("this is another kind of machine"))
    };
    if let Err(why) = &verified {
        println!("  the verifier's statistics are left out: {why:#}");
    }
    let verified = verified.unwrap_or_default();
    for (name, instructions) in &programs {
        let verified = verified.get(name).map_or(String::new(), |verdict| format!("; {verdict}"));
        println!("  {name}: {instructions} instructions{verified}");
    }
    Ok(programs)
}

/// An object without what only a debugger reads. BTF is made from it, and has what is wanted.
fn without_dwarf(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut object = Builder::read(bytes)?;
    for section in &mut object.sections {
        let name = section.name.to_vec();
        section.delete = [&b".debug_"[..], b".rel.debug_"].iter().any(|it| name.starts_with(it));
    }
    object.delete_orphans();
    // LLVM puts the names of sections among those of symbols, where they cannot be written back.
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(stripped)
}

/// The programs of an object and the functions that they share, each with its number of instructions.
fn programs(bytes: &[u8]) -> Result<Lengths> {
    let object = object::File::parse(bytes)?;
    let mut programs = Vec::new();
    for symbol in object.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let Some(index) = symbol.section_index() else { continue };
        let section = object.section_by_index(index)?;
        // In `.text` lies what programs call: functions of ours, and of the compiler, which are hidden.
        let is_ours = section.name()? != ".text" || symbol.scope() == SymbolScope::Dynamic;
        if section.kind() == SectionKind::Text && is_ours {
            programs.push((symbol.name()?.to_owned(), symbol.size() / INSTRUCTION));
        }
    }
    Ok(programs)
}

/// An untouched file spares everybody the rebuild of the user half.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}
