//! What this machine's kernel says of the programs of an object: how much work they are to verify,
//! and how large they become. Nothing is attached, and nothing stays.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::{Program, ProgramError};

/// Loads every program, and returns the kernel's verdicts by the programs' names.
pub(super) fn statistics(object: &[u8]) -> Result<BTreeMap<String, String>> {
    let mut kernel = Ebpf::load(object).context("load the object's maps (as root?)")?;
    let verdict = |(name, program): (&str, &mut Program)| {
        let verdict = match verify(program) {
            Ok(statistics) => statistics,
            Err(error) => format!("not loaded: {:#}", anyhow::Error::from(error)),
        };
        (name.to_owned(), verdict)
    };
    Ok(kernel.programs_mut().map(verdict).collect())
}

fn verify(program: &mut Program) -> Result<String, ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load()?,
        Program::CgroupSockopt(program) => program.load()?,
        Program::SkMsg(program) => program.load()?,
        Program::SkSkb(program) => program.load()?,
        Program::SockOps(program) => program.load()?,
        _ => return Err(ProgramError::UnexpectedProgramType),
    }
    let info = program.info()?;
    let known = |size: Option<u32>| size.map_or_else(|| "?".into(), |size| size.to_string());
    Ok(format!(
        "{} verified, {} bytes translated, {} bytes of machine code, {} bytes locked",
        known(info.verified_instruction_count()),
        known(info.size_translated()),
        known(Some(info.size_jitted())),
        info.memory_locked()?,
    ))
}
