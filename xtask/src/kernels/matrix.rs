//! The table of what works where: a column a kernel, a row a finding, and below it the reasons.

use std::fmt;

use ambassador::bench::table::Table;
use anyhow::Result;

use super::Verdict;
use super::visit::{Finding, Visit};

#[derive(Default)]
pub(super) struct Matrix {
    visits: Vec<Visit>,
}

impl Matrix {
    /// Takes in what was found on a kernel, and says what it is worth.
    pub(super) fn enter(&mut self, visit: Result<Visit>) -> Verdict {
        match visit {
            Err(why) => Verdict::Failed(format!("{why:#}")),
            Ok(visit) => {
                let wrong = visit.wrong.join("\n");
                self.visits.push(visit);
                if wrong.is_empty() { Verdict::Passed } else { Verdict::Failed(wrong) }
            }
        }
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernels = self.visits.iter().map(|visit| visit.kernel.clone());
        let mut table = Table::new([String::new()].into_iter().chain(kernels).collect());
        let mut remarks: Vec<String> = Vec::new();
        for what in self.rows() {
            let found = self.visits.iter().map(|visit| finding(visit, what));
            let cells = found.map(|found| found.map_or("", |it| it.cell.as_str()).to_owned());
            table.row([what.to_owned()].into_iter().chain(cells).collect());
            remarks.extend(self.remarks(what));
        }
        writeln!(f, "{}", table.render())?;
        remarks.iter().try_for_each(|remark| writeln!(f, "- {remark}"))
    }
}

impl Matrix {
    /// What was found anywhere, in the order in which it was.
    fn rows(&self) -> Vec<&str> {
        let mut rows = Vec::new();
        for finding in self.visits.iter().flat_map(|visit| &visit.findings) {
            if !rows.contains(&finding.what.as_str()) {
                rows.push(&finding.what);
            }
        }
        rows
    }

    /// The reasons given for what was found, each once, with the kernels it is given on.
    fn remarks(&self, what: &str) -> Vec<String> {
        let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
        for visit in &self.visits {
            let reason = finding(visit, what).and_then(|finding| finding.remark.as_deref());
            let Some(reason) = reason else { continue };
            match reasons.iter_mut().find(|(given, _)| *given == reason) {
                Some((_, kernels)) => kernels.push(&visit.kernel),
                None => reasons.push((reason, vec![&visit.kernel])),
            }
        }
        let line = |(reason, kernels): (&str, Vec<&str>)| match kernels.len() {
            all if all == self.visits.len() => format!("{what}: {reason}"),
            _ => format!("{what} on {}: {reason}", kernels.join(", ")),
        };
        reasons.into_iter().map(line).collect()
    }
}

fn finding<'a>(visit: &'a Visit, what: &str) -> Option<&'a Finding> {
    visit.findings.iter().find(|finding| finding.what == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(kernel: &str, found: [(&str, &str, Option<&str>); 1]) -> Visit {
        let findings = found
            .map(|(what, cell, remark)| Finding {
                what: what.into(),
                cell: cell.into(),
                remark: remark.map(str::to_owned),
            })
            .into();
        Visit { kernel: kernel.into(), findings, wrong: Vec::new() }
    }

    #[test]
    fn a_reason_names_the_kernels_it_is_given_on_unless_all_give_it() {
        let mut matrix = Matrix::default();
        matrix.enter(Ok(visit("6.1", [("direct", "no", Some("too old"))])));
        let shown = matrix.to_string();
        assert!(shown.ends_with("\n\n- direct: too old\n"), "{shown}");

        matrix.enter(Ok(visit("6.12", [("direct", "works", None)])));
        let shown = matrix.to_string();
        assert!(shown.contains("| direct |  no | works |\n"), "{shown}");
        assert!(shown.ends_with("\n\n- direct on 6.1: too old\n"), "{shown}");
    }
}
