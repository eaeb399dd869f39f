//! Where this kernel keeps the fields of a socket that the programs read: looked up in its BTF.
//!
//! The compiler of the programs emits no relocations for them, so they are told the offsets when they are
//! loaded. A wrong offset cannot do harm: the verifier holds each against the types of the same BTF.

use std::fs::{self, File};
use std::io;

use ambassador_ebpf::sockmap::SocketLayout;
use anyhow::{Context, Result, bail, ensure};
use memmap2::{Mmap, MmapOptions};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNCTION_PROTOTYPE: u32 = 13;
const DATA_SECTION: u32 = 15;
const ENUM64: u32 = 19;
/// Bytes of the three words that each type begins with.
const WORDS: usize = 12;
/// Unnamed structures within each other; the kernel's are two deep.
const MOST_NESTED: u8 = 8;

/// What the programs are told of the running kernel.
pub struct Layout {
    pub sockets: Result<SocketLayout>,
    /// Where `skc_ipv6only` lies, in bits from the start of any socket; the lowest bit of a byte first.
    pub ipv6only_bit: Result<u32>,
    /// Where `sk_err` lies, in bytes from the start of a TCP socket.
    pub socket_error: Result<u32>,
    /// Where `is_mptcp` lies, the same.
    pub multipath: Result<u32>,
}

/// The layout of the running kernel. Its description is several megabytes, so it is read once for both.
pub fn of_this_kernel() -> Result<Layout> {
    // Where it can be mapped (6.16), a page is fetched when it is looked at. Else each takes a call.
    let mapped = mapped();
    let read;
    let bytes = match &mapped {
        Ok(mapped) => &mapped[..],
        Err(_) => {
            read = fs::read(VMLINUX).with_context(|| format!("read {VMLINUX}"))?;
            &read[..]
        }
    };
    let btf = Btf::parse(bytes).with_context(|| format!("read {VMLINUX}"))?;
    let sockets = sockets(&btf).with_context(|| format!("find the layout of sockets in {VMLINUX}"));
    let of_tcp = |path: &[&str]| Ok(u32::try_from(btf.offset("tcp_sock", path)?)?);
    Ok(Layout {
        sockets,
        ipv6only_bit: ipv6only_bit(&btf),
        socket_error: of_tcp(&["inet_conn", "icsk_inet", "sk", "sk_err"]),
        multipath: of_tcp(&["is_mptcp"]),
    })
}

fn mapped() -> io::Result<Mmap> {
    let file = File::open(VMLINUX)?;
    let private = MmapOptions::new();
    // Shared it is refused (kernel/bpf/sysfs_btf.c).
    // SAFETY: it is a part of the running kernel, which nobody writes to or makes shorter.
    unsafe { private.map_copy_read_only(&file) }
}

fn ipv6only_bit(btf: &Btf<'_>) -> Result<u32> {
    let common = btf.named(STRUCT, "sock_common")?;
    let (bit, _) = btf.member(common, "skc_ipv6only", MOST_NESTED).context("find skc_ipv6only")?;
    let bit = u32::try_from(bit).context("find skc_ipv6only")?;
    // Where the first byte of a word is its highest, so is the first bit of a byte.
    Ok(if cfg!(target_endian = "big") { bit / 8 * 8 + (7 - bit % 8) } else { bit })
}

fn sockets(btf: &Btf<'_>) -> Result<SocketLayout> {
    let sock = ["inet_conn", "icsk_inet", "sk"];
    let of_sock = |path: &[&str]| btf.offset("tcp_sock", &[&sock, path].concat());
    Ok(SocketLayout {
        write_seq: btf.offset("tcp_sock", &["write_seq"])?,
        snd_una: btf.offset("tcp_sock", &["snd_una"])?,
        bytes_acked: btf.offset("tcp_sock", &["bytes_acked"])?,
        sk_socket: of_sock(&["sk_socket"])?,
        sk_flags: of_sock(&["__sk_common", "skc_flags"])?,
        sk_sndbuf: of_sock(&["sk_sndbuf"])?,
        file: btf.offset("socket", &["file"])?,
        f_flags: btf.offset("file", &["f_flags"])?,
        zerocopy: btf.enumerator("sock_flags", "SOCK_ZEROCOPY")?,
        ulp: btf.offset("tcp_sock", &["inet_conn", "icsk_ulp_ops"])?,
    })
}

/// The kernel's description of its types (Documentation/bpf/btf.rst), as far as structures need it.
struct Btf<'a> {
    strings: &'a [u8],
    types: &'a [u8],
    /// Where each begins, by id, which counts from 1: there are more than 100,000 of them.
    starts: Vec<u32>,
}

#[derive(Clone, Copy)]
struct Type<'a> {
    name: u32,
    info: u32,
    size_or_type: u32,
    /// Members or enumerators.
    rest: &'a [u8],
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let magic = bytes.get(..2).and_then(|it| it.try_into().ok()).map(u16::from_ne_bytes);
        ensure!(magic == Some(MAGIC), "this is not BTF in this machine's byte order");
        let header = |at| word(bytes, at).context("the header is cut off");
        let section = |offset: usize| {
            let start = (header(4)? + header(offset)?) as usize;
            let length = header(offset + 4)? as usize;
            bytes.get(start..start + length).context("a section is cut off")
        };
        let (types, strings) = (section(8)?, section(16)?);
        let (mut start, mut starts) = (0, Vec::new());
        while start < types.len() {
            let length = Type::at(types, start).context("a type is cut off")?.length();
            starts.push(u32::try_from(start).context("there is too much of it")?);
            start += length;
        }
        Ok(Self { strings, types, starts })
    }

    /// Every type, by id from 1.
    fn each(&self) -> impl Iterator<Item = Type<'a>> {
        self.starts.iter().filter_map(|&start| Type::at(self.types, start as usize))
    }

    /// The offset of a member in a structure, through members of members.
    fn offset(&self, structure: &str, path: &[&str]) -> Result<u64> {
        let mut here = self.named(STRUCT, structure)?;
        let mut offset = 0;
        for name in path {
            let (bits, id) = self
                .member(here, name, MOST_NESTED)
                .with_context(|| format!("struct {structure} has no {}", path.join(".")))?;
            ensure!(bits % 8 == 0, "{name} of struct {structure} is a bit field");
            offset += bits / 8;
            // The end of a path may be of any type; before it, only structures have members.
            here = self.resolved(id)?;
        }
        Ok(offset)
    }

    fn enumerator(&self, enumeration: &str, name: &str) -> Result<u64> {
        let values = self.named(ENUM, enumeration)?.rest;
        let value = values.chunks_exact(8).find(|it| self.is(word(it, 0), name));
        let value = value.with_context(|| format!("enum {enumeration} has no {name}"))?;
        word(value, 4).map(u64::from).context("an enumerator is cut off")
    }

    fn named(&self, kind: u32, name: &str) -> Result<Type<'a>> {
        let found = self.each().find(|it| it.kind() == kind && self.is(Some(it.name), name));
        found.with_context(|| format!("there is no {name}"))
    }

    /// Where a member begins, in bits, and the id of its type.
    fn member(&self, structure: Type<'a>, name: &str, nested: u8) -> Option<(u64, u32)> {
        if !matches!(structure.kind(), STRUCT | UNION) {
            return None;
        }
        structure.rest.chunks_exact(12).find_map(|member| {
            let (id, bits) = (word(member, 4)?, word(member, 8)?);
            // With bit fields in the structure, the upper byte is a member's width.
            let bits =
                u64::from(if structure.has_bit_fields() { bits & 0x00ff_ffff } else { bits });
            if self.is(word(member, 0), name) {
                return Some((bits, id));
            }
            let unnamed = self.is(word(member, 0), "") && nested > 0;
            let within = unnamed.then(|| self.resolved(id).ok()).flatten()?;
            let (inner, id) = self.member(within, name, nested - 1)?;
            Some((bits + inner, id))
        })
    }

    /// The type of an id, without its other names.
    fn resolved(&self, mut id: u32) -> Result<Type<'a>> {
        for _ in 0..MOST_NESTED {
            let start = self.starts.get((id as usize).wrapping_sub(1));
            let found = start.and_then(|&start| Type::at(self.types, start as usize));
            let found = found.context("a type is missing")?;
            if !(TYPEDEF..=TYPEDEF + 3).contains(&found.kind()) {
                return Ok(found);
            }
            id = found.size_or_type;
        }
        bail!("a type has too many names")
    }

    fn is(&self, offset: Option<u32>, name: &str) -> bool {
        let string = offset.and_then(|offset| self.strings.get(offset as usize..));
        string
            .and_then(|it| it.strip_prefix(name.as_bytes()))
            .is_some_and(|it| it.first() == Some(&0))
    }
}

impl<'a> Type<'a> {
    /// None if it is cut off.
    fn at(types: &'a [u8], start: usize) -> Option<Self> {
        let (words, rest) = types.get(start..)?.split_first_chunk::<WORDS>()?;
        let [name, info, size_or_type] = [0, 4, 8].map(|at| word(words, at));
        let kind = Self { name: name?, info: info?, size_or_type: size_or_type?, rest: &[] };
        let rest = rest.get(..kind.length() - WORDS)?;
        Some(Self { rest, ..kind })
    }

    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn has_bit_fields(&self) -> bool {
        self.info >> 31 == 1
    }

    /// In bytes.
    fn length(&self) -> usize {
        const INT: u32 = 1;
        const VARIABLE: u32 = 14;
        const DECLARATION_TAG: u32 = 17;
        let members = (self.info & 0xffff) as usize;
        let rest = match self.kind() {
            INT | VARIABLE | DECLARATION_TAG => 4,
            ARRAY => 12,
            STRUCT | UNION | DATA_SECTION | ENUM64 => 12 * members,
            ENUM | FUNCTION_PROTOTYPE => 8 * members,
            _ => 0,
        };
        WORDS + rest
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(bytes: &[u8]) -> Result<SocketLayout> {
        sockets(&Btf::parse(bytes)?)
    }

    #[test]
    fn what_is_not_btf_is_refused_in_words() {
        for bytes in [&b""[..], b"\x7fELF", &MAGIC.to_ne_bytes()] {
            assert!(find(bytes).is_err());
        }
    }

    proptest! {
        #[test]
        fn broken_btf_is_an_error_and_no_panic(
            sections in prop::array::uniform5(0_u32..80),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
            bytes.extend(sections.iter().flat_map(|word| word.to_ne_bytes()));
            bytes.extend(rest);
            prop_assert!(find(&bytes).is_err());
        }
    }
}
