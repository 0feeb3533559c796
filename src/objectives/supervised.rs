//! Next-token cross entropy over the trained tokens.

use crate::model::Target;

/// The trained positions of rows that stand one behind another, each given by its labels: the hidden row of position
/// `i` predicts the label of `i + 1`. Position 0 is never a target. Each weighs 1; the trainer divides by the tokens
/// of the whole step.
pub fn targets<'a>(rows: impl IntoIterator<Item = &'a [Option<u32>]>) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut start = 0;
    for labels in rows {
        let trained = labels.iter().enumerate().skip(1);
        targets.extend(
            trained
                .filter_map(|(place, label)| label.map(|token| Target { row: start + place - 1, token, weight: 1.0 })),
        );
        start += labels.len();
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_starts_anew() {
        let rows: [&[Option<u32>]; 2] = [&[Some(4), None, Some(5)], &[Some(6), Some(8)]];
        let found: Vec<(usize, u32)> = targets(rows).iter().map(|t| (t.row, t.token)).collect();
        assert_eq!(found, [(1, 5), (3, 8)]);
    }
}
