//! How alike two texts are, 0 to 1.

use std::collections::HashMap;

use crate::domain::spec::Similarity;

/// Characters or words of each text that are looked at: the work grows with their product.
const MOST: usize = 4096;

pub fn similarity(metric: Similarity, text: &str, reference: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        let lower = text.to_lowercase();
        let words = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        words.take(MOST).map(str::to_owned).collect()
    };
    let ngrams = |n: usize| overlap(&words(text), &words(reference), n);
    match metric {
        // 1 − (insertions and deletions) / (both lengths), as RapidFuzz's `ratio`.
        Similarity::FuzzyMatch => {
            let chars = |text: &str| text.chars().take(MOST).collect::<Vec<_>>();
            harmonic_of(&chars(text), &chars(reference))
        }
        Similarity::Rouge1 => ngrams(1),
        Similarity::Rouge2 => ngrams(2),
        Similarity::Rouge3 => ngrams(3),
        Similarity::Rouge4 => ngrams(4),
        Similarity::Rouge5 => ngrams(5),
        Similarity::RougeL => harmonic_of(&words(text), &words(reference)),
    }
}

/// ROUGE-N's F1: shared n-grams, counted as often as both have them.
fn overlap(text: &[String], reference: &[String], n: usize) -> f64 {
    let count = |words: &[String]| {
        let mut counts: HashMap<Vec<String>, usize> = HashMap::new();
        words.windows(n).for_each(|window| *counts.entry(window.to_vec()).or_default() += 1);
        counts
    };
    let (ours, theirs) = (count(text), count(reference));
    let shared: usize = ours.iter().map(|(ngram, n)| theirs.get(ngram).map_or(0, |m| *n.min(m))).sum();
    let total = ours.values().sum::<usize>() + theirs.values().sum::<usize>();
    if total == 0 { 0.0 } else { 2.0 * shared as f64 / total as f64 }
}

/// `2·LCS / (both lengths)`: ROUGE-L's F1 over words. Two empty sequences are the same.
fn harmonic_of<T: PartialEq>(a: &[T], b: &[T]) -> f64 {
    let mut lengths = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = lengths[j + 1];
            lengths[j + 1] = if x == y { diagonal + 1 } else { above.max(lengths[j]) };
            diagonal = above;
        }
    }
    let total = a.len() + b.len();
    if total == 0 { 1.0 } else { 2.0 * lengths[b.len()] as f64 / total as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let near = |metric, a: &str, b: &str, expected: f64| {
            let found = similarity(metric, a, b);
            assert!((found - expected).abs() < 1e-12, "{metric:?} {a:?} {b:?}: {found}");
        };
        // LCS "kitten"/"sitting" = "ittn", 4 of 6 + 7.
        near(Similarity::FuzzyMatch, "kitten", "sitting", 8.0 / 13.0);
        near(Similarity::FuzzyMatch, "", "", 1.0);
        near(Similarity::FuzzyMatch, "a", "", 0.0);
        near(Similarity::Rouge1, "the cat sat", "The cat, the mat", 4.0 / 7.0);
        near(Similarity::Rouge2, "the cat sat", "the cat the mat", 2.0 / 5.0);
        near(Similarity::RougeL, "a b c d", "a x c d", 0.75);
        near(Similarity::Rouge5, "too short", "too short", 0.0);
    }
}
