//! The best of a few.

use std::cmp::Ordering;

/// Whether each is among the k largest; of equal ones the first.
pub fn largest(values: &[f32], k: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].partial_cmp(&values[*a]).unwrap_or(Ordering::Equal));
    let mut kept = vec![false; values.len()];
    order.iter().take(k).for_each(|i| kept[*i] = true);
    kept
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn the_largest_and_of_equal_ones_the_first() {
        assert_eq!(largest(&[0.1, 0.4, 0.2, 0.3], 2), [false, true, false, true]);
        assert_eq!(largest(&[0.25, 0.25, 0.25, 0.25], 2), [true, true, false, false]);
    }
}
