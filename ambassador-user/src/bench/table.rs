//! A table that is Markdown and, being aligned, is read as well in a terminal.

/// Rows under headings; the first column is text, the others are numbers.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With nothing under the headings yet.
    pub fn new(headings: Vec<String>) -> Self {
        Self { rows: vec![headings] }
    }

    /// Adds a row with as many cells as there are headings.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The lines of the table.
    pub fn render(&self) -> String {
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3)
        };
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        let rule = widths.iter().enumerate().map(|(column, width)| match column {
            0 => "-".repeat(*width),
            _ => format!("{}:", "-".repeat(width - 1)),
        });
        let rule = line(rule);
        let mut lines = self.rows.iter().map(|row| {
            line(row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            }))
        });
        let headings = lines.next().unwrap_or_default();
        headings + &rule + &lines.collect::<String>()
    }
}

/// Three digits that matter: `1.45M`, `101k`, `12.3`, `20k`.
pub fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 999_500.0 => (value / 1e6, "M"),
        value if value >= 9_995.0 => (value / 1e3, "k"),
        value => (value, ""),
    };
    let decimals = match value {
        value if value < 0.9995 => 3,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    let digits = format!("{value:.decimals$}");
    // `20k` and not `20.0k`, but `1.30` beside `1.08`.
    let digits = [".000", ".00", ".0"]
        .iter()
        .find_map(|zeroes| digits.strip_suffix(zeroes))
        .unwrap_or(&digits);
    format!("{digits}{unit}")
}

fn line(cells: impl Iterator<Item = String>) -> String {
    format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_whatever_their_size() {
        let shown =
            [1_450_000.0, 999_600.0, 101_493.0, 9_994.0, 99.96, 12.34, 0.167, 0.0].map(short);
        assert_eq!(shown, ["1.45M", "1M", "101k", "9994", "100", "12.3", "0.167", "0"]);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(vec!["tier".into(), "p50 µs".into()]);
        table.row(vec!["splice".into(), "9".into()]);
        assert_eq!(
            table.render(),
            "| tier   | p50 µs |\n| ------ | -----: |\n| splice |      9 |\n"
        );
    }
}
