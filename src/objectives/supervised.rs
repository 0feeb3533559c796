//! Next-token cross entropy over the trained tokens.

use crate::{data::Example, model::Target};

/// The trained positions of rows that stand one behind another: the hidden row of position `i` predicts the label of
/// `i + 1`. Position 0 is never a target. Each weighs 1; the trainer divides by the tokens of the whole step.
pub fn targets(rows: &[&Example]) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut start = 0;
    for row in rows {
        let labels = row.labels.iter().enumerate().skip(1);
        targets.extend(
            labels
                .filter_map(|(place, label)| label.map(|token| Target { row: start + place - 1, token, weight: 1.0 })),
        );
        start += row.ids.len();
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_starts_anew() {
        let row = |labels: &[Option<u32>]| Example { line: 1, ids: vec![7; labels.len()], labels: labels.to_vec() };
        let (a, b) = (row(&[Some(4), None, Some(5)]), row(&[Some(6), Some(8)]));
        let found: Vec<(usize, u32)> = targets(&[&a, &b]).iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(found, [(1, 5), (3, 8)]);
        assert_eq!(targets(&[&a, &b]).len(), a.trained() + b.trained());
    }
}
