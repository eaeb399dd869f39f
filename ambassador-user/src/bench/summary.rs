//! What several measurements of one thing come to.

/// The middle of some values, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Half of the values are above, half below.
    pub median: f64,
    /// The lowest of them.
    pub lowest: f64,
    /// The highest of them.
    pub highest: f64,
}

impl Summary {
    /// None of no values.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (lowest, highest) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, lowest, highest })
    }

    /// From the lowest to the highest, as a part of the median.
    pub fn spread(&self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.highest - self.lowest) / self.median }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        let summary = |values: &[f64]| Summary::of(values.to_vec());
        let three = summary(&[3.0, 1.0, 2.0]).expect("values");
        assert_eq!(
            (three.median, three.lowest, three.highest, three.spread()),
            (2.0, 1.0, 3.0, 1.0)
        );
        assert_eq!(summary(&[4.0, 1.0, 3.0, 2.0]).map(|summary| summary.median), Some(2.5));
        assert_eq!(summary(&[]), None);
    }
}
