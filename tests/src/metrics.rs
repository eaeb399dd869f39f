//! What `/metrics` says, as samples that can be added up.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// The samples of one scrape.
#[derive(Debug, Clone)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads the text format.
    pub fn parse(text: &str) -> Result<Self> {
        let samples = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| sample(line).with_context(|| format!("read the sample {line:?}")))
            .collect::<Result<_>>()?;
        Ok(Self { samples })
    }

    /// The sum over the samples of this name that carry all these labels; `None` without one.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.samples
            .iter()
            .filter(|sample| sample.name == name)
            .filter(|sample| {
                labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|it| it == value))
            })
            .map(|sample| sample.value)
            .reduce(|sum, value| sum + value)
    }
}

fn sample(line: &str) -> Result<Sample> {
    let (series, value) = line.rsplit_once(' ').context("find the value")?;
    let (name, labels) = match series.split_once('{') {
        None => (series, BTreeMap::new()),
        Some((name, labels)) => {
            let labels = labels.strip_suffix('}').context("find the end of the labels")?;
            (name, self::labels(labels)?)
        }
    };
    let value = value.parse().with_context(|| format!("parse the value {value:?}"))?;
    Ok(Sample { name: name.into(), labels, value })
}

/// Label values are quoted; a quote or backslash within is escaped.
fn labels(text: &str) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (key, quoted) = rest.split_once("=\"").context("find a label's value")?;
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        let end = loop {
            match characters.next().context("find the end of a label's value")? {
                (end, '"') => break end,
                (_, '\\') => match characters.next().context("find what is escaped")?.1 {
                    'n' => value.push('\n'),
                    escaped => value.push(escaped),
                },
                (_, plain) => value.push(plain),
            }
        };
        labels.insert(key.to_owned(), value);
        rest = quoted[end + 1..].trim_start_matches(',');
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_add_up_by_label() -> Result<()> {
        let metrics = Metrics::parse(
            "# TYPE c counter\nc_total{route=\"a,b\",way=\"up\"} 2\nc_total{route=\"a,b\",way=\"do\\\"wn\"} 3\nup 1.5\n# EOF\n",
        )?;
        assert_eq!(metrics.sum("c_total", &[("route", "a,b")]), Some(5.0));
        assert_eq!(metrics.sum("c_total", &[("way", "do\"wn")]), Some(3.0));
        assert_eq!(metrics.sum("up", &[]), Some(1.5));
        assert_eq!(metrics.sum("c_total", &[("route", "other")]), None);
        Ok(())
    }
}
