//! Bugs of kernels that the `sockmap` tier may meet, by the releases that have them; from the kernel's own
//! CVE records (git.kernel.org, vulns.git).
//!
//! A grave one closes the tier where the release says that it is there. Where it does not say (distributions
//! mend their kernels without renumbering them), the bug is told, and behaviour decides.
//!
//! Left out is what sockets of this tier cannot come to: it has no verdict on received data, so no backlog
//! and no ingress queue (CVE-2025-38165, -38154, CVE-2024-56694, -41048, -36938, -26731, CVE-2023-53836,
//! -53133, CVE-2022-49207, CVE-2026-43016); its program neither corks, nor sets apply_bytes, nor changes a
//! message (CVE-2026-74589, -68284, -63830, CVE-2025-39913, -38166, CVE-2024-56720, -56633, -46783,
//! CVE-2022-50536, -49877, -49204); its maps hold neither listeners, nor UDP, Unix or vsock sockets, are
//! small hashes, and are deleted from by user space only (CVE-2025-68227, -21854, CVE-2024-56664, -47710,
//! -35895, CVE-2023-52986, -52735, -52523, CVE-2022-50259).
#![forbid(unsafe_code)]

use std::fmt;
use std::fs;

use serde::Serialize;

/// As upstream numbers it.
type Release = (u16, u16, u16);

struct Bug {
    id: &'static str,
    /// The series that first had it.
    since: (u16, u16),
    /// Where it is mended: a release of each series that was looked after then, the first one without it last.
    mended: &'static [Release],
    /// Whether it crashes the machine, or costs a connection its end.
    grave: bool,
    effect: &'static str,
}

const BUGS: [Bug; 5] = [
    Bug {
        id: "CVE-2025-38112",
        since: (4, 17),
        mended: &[
            (5, 10, 239),
            (5, 15, 186),
            (6, 1, 142),
            (6, 6, 94),
            (6, 12, 34),
            (6, 15, 3),
            (6, 16, 0),
        ],
        grave: true,
        effect: "a client that polls while its socket is handed back may crash the machine",
    },
    Bug {
        id: "CVE-2024-39500",
        since: (5, 13),
        mended: &[(5, 15, 162), (6, 1, 95), (6, 6, 35), (6, 9, 6), (6, 10, 0)],
        grave: true,
        effect: "a client that closes while its socket is handed back may never be closed",
    },
    Bug {
        id: "CVE-2022-50409",
        since: (4, 20),
        mended: &[(5, 4, 220), (5, 10, 150), (5, 15, 75), (5, 19, 17), (6, 0, 3), (6, 1, 0)],
        grave: true,
        effect: "a blocking client that waits for memory while its upstream closes may crash the machine",
    },
    Bug {
        id: "CVE-2022-49209",
        since: (4, 20),
        mended: &[(5, 4, 189), (5, 10, 110), (5, 15, 33), (5, 16, 19), (5, 17, 2), (5, 18, 0)],
        grave: false,
        effect: "memory is lost where a client has to wait for it",
    },
    Bug {
        id: "CVE-2022-49205",
        since: (4, 20),
        mended: &[(5, 4, 189), (5, 10, 110), (5, 15, 33), (5, 16, 19), (5, 17, 2), (5, 18, 0)],
        grave: false,
        effect: "memory is accounted for twice where a client writes while its upstream closes",
    },
];

/// A bug that the running kernel has, or may have.
#[derive(Debug, Serialize)]
pub struct Known {
    id: &'static str,
    effect: &'static str,
    /// The releases that mend it.
    mended: String,
    /// Its release says that this kernel has it.
    certain: bool,
    /// Whether the tier is not to be used, nor even tried.
    pub closes: bool,
}

/// Those of the running kernel.
pub fn here() -> Vec<Known> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let version = Version::of(
        &read("/proc/sys/kernel/osrelease"),
        &read("/proc/sys/kernel/version"),
        &read("/proc/version_signature"),
    );
    // A kernel that has no number is judged by what it does.
    version.map(|version| version.bugs().collect()).unwrap_or_default()
}

/// Why the tier is not to be used on the running kernel, if it has a bug that is grave.
pub fn obstacle() -> Option<String> {
    here().into_iter().find(|bug| bug.closes).map(|bug| bug.to_string())
}

impl Known {
    fn new(bug: &Bug, certain: bool) -> Self {
        let mended = bug.mended.iter().map(|release| match release {
            (major, minor, 0) => format!("{major}.{minor}"),
            (major, minor, patch) => format!("{major}.{minor}.{patch}"),
        });
        Self {
            id: bug.id,
            effect: bug.effect,
            mended: mended.collect::<Vec<_>>().join(", "),
            certain,
            closes: certain && bug.grave,
        }
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, effect, mended, .. } = self;
        let has = if self.certain { "has" } else { "may have" };
        write!(f, "this kernel {has} {id}: {effect}; Linux {mended} mend it")
    }
}

/// What the running kernel says of its age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    series: (u16, u16),
    /// Unknown where a distribution stays with the number that it began with.
    patch: Option<u16>,
    /// Whether nothing newer was put into it, as far as such things are told.
    exact: bool,
}

impl Version {
    /// By what uname(2) says, and what Ubuntu says beside it.
    fn of(release: &str, version: &str, signature: &str) -> Option<Self> {
        // Debian: "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-06-20)"
        let debian = version.split_whitespace().skip_while(|word| *word != "Debian").nth(1);
        // Ubuntu: "Ubuntu 5.15.0-91.101-generic 5.15.131"; it mends more than that number says.
        let ubuntu = signature.split_whitespace().last();
        let number = debian.or(ubuntu).unwrap_or(release.trim());
        let length = number.find(|it: char| it != '.' && !it.is_ascii_digit());
        let (digits, rest) = number.split_at(length.unwrap_or(number.len()));
        let mut parts = digits.split('.').map(str::parse);
        let mut part = || parts.next()?.ok();
        let (series, patch) = ((part()?, part()?), part().unwrap_or(0));
        let original = patch == 0 && !rest.is_empty();
        Some(Self {
            series,
            patch: (!original).then_some(patch),
            exact: debian.is_some() || ubuntu.is_none(),
        })
    }

    fn bugs(self) -> impl Iterator<Item = Known> {
        BUGS.iter().filter_map(move |bug| Some(Known::new(bug, self.has(bug)?)))
    }

    /// Whether it has a bug for certain; none if it does not have it.
    fn has(self, bug: &Bug) -> Option<bool> {
        let without =
            bug.mended.last().is_some_and(|&(major, minor, _)| self.series >= (major, minor));
        if self.series < bug.since || without {
            return None;
        }
        let mended = bug.mended.iter().find(|&&(major, minor, _)| self.series == (major, minor));
        match (mended, self.patch) {
            (Some(&(.., mended)), Some(patch)) if patch >= mended => None,
            (_, patch) => Some(self.exact && patch.is_some()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(release: &str) -> Version {
        Version::of(release, "#1 SMP", "").unwrap()
    }

    fn ids(version: Version) -> Vec<(&'static str, bool)> {
        version.bugs().map(|known| (known.id, known.closes)).collect()
    }

    #[test]
    fn a_bug_ends_with_the_release_that_mends_it_in_each_series() {
        for (with, without) in
            [("6.1.141", "6.1.142"), ("6.12.33", "6.12.34"), ("6.15.2", "6.15.3")]
        {
            assert_eq!(ids(version(with)), [("CVE-2025-38112", true)], "{with}");
            assert_eq!(ids(version(without)), [], "{without}");
        }
        // Of a series that nobody looked after any more.
        assert_eq!(ids(version("6.13.12")), [("CVE-2025-38112", true)]);
        assert_eq!(ids(version("5.15.32")).len(), BUGS.len());
        for without in ["6.16.0", "6.18.44-some", "7.2.1"] {
            assert_eq!(ids(version(without)), [], "{without}");
        }
    }

    #[test]
    fn a_release_that_says_nothing_closes_nothing() {
        for base in ["5.15.0-200.131.27.el9uek.x86_64", "6.12.0-55.9.1.el10_0.x86_64"] {
            let found = ids(version(base));
            assert!(
                !found.is_empty() && found.iter().all(|(_, closes)| !closes),
                "{base}: {found:?}"
            );
        }
    }

    #[test]
    fn distributions_are_taken_by_the_number_of_the_release_that_they_follow() {
        let debian = |told| Version::of("6.1.0-37-cloud-amd64", told, "").unwrap();
        let new = debian("#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-06-20)");
        assert_eq!(new, Version { series: (6, 1), patch: Some(176), exact: true });
        assert_eq!(ids(debian("#1 SMP Debian 6.1.140-1 (2025-05-22)")), [("CVE-2025-38112", true)]);
        let ubuntu = |told| Version::of("5.15.0-91-generic", "#101-Ubuntu SMP", told).unwrap();
        assert_eq!(ids(ubuntu("Ubuntu 5.15.0-191.201-generic 5.15.190\n")), []);
        let old = ids(ubuntu("Ubuntu 5.15.0-91.101-generic 5.15.131\n"));
        assert_eq!(old, [("CVE-2025-38112", false), ("CVE-2024-39500", false)]);
    }

    #[test]
    fn it_is_told_in_one_line() {
        let told = version("6.12.0-55.9.1.el10_0.x86_64").bugs().next().unwrap().to_string();
        assert_eq!(
            told,
            "this kernel may have CVE-2025-38112: a client that polls while its socket is handed back may \
             crash the machine; Linux 5.10.239, 5.15.186, 6.1.142, 6.6.94, 6.12.34, 6.15.3, 6.16 mend it"
        );
    }

    #[test]
    fn the_table_is_in_order() {
        for Bug { id, since, mended, .. } in &BUGS {
            assert!(mended.is_sorted() && mended.last().is_some_and(|last| last.2 == 0), "{id}");
            assert!(mended.iter().all(|&(major, minor, _)| (major, minor) > *since), "{id}");
        }
    }
}
