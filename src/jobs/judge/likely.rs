//! How likely a model is to answer with each of a few texts. A text may have several spellings (with a space before
//! it) of several tokens each: `P(text) = Σ over spellings Π over tokens P(token | what is before it)`. Where a spelling
//! begins another one, as 1 begins 10, the longer one's share is not the shorter one's.

use std::collections::HashMap;

use super::Seat;

/// In the order of `labels`. `asked` hears of each pass's tokens.
pub async fn likelihoods(
    seat: &Seat,
    prompt: &[u32],
    labels: &[String],
    mut asked: impl FnMut(u64),
) -> Result<Vec<f64>, String> {
    let mut spellings: Vec<(usize, Vec<u32>)> = Vec::new();
    for (i, label) in labels.iter().enumerate() {
        for text in [label.clone(), format!(" {label}")] {
            let ids = seat.tokens(&text)?;
            if !ids.is_empty() && !spellings.iter().any(|(_, known)| *known == ids) {
                spellings.push((i, ids));
            }
        }
    }
    // What follows each beginning; most spellings are one token, so that one pass tells all.
    let mut known: HashMap<&[u32], Vec<f64>> = HashMap::new();
    let mut shares = Vec::with_capacity(spellings.len());
    for (_, ids) in &spellings {
        let mut share = 1.0;
        for (place, id) in ids.iter().enumerate() {
            let before = &ids[..place];
            if !known.contains_key(before) {
                let text = [prompt, before].concat();
                asked(text.len() as u64);
                known.insert(before, seat.next(&text).await?);
            }
            share *= known.get(before).and_then(|next| next.get(*id as usize)).copied().unwrap_or(0.0);
        }
        shares.push(share);
    }
    Ok(apart(labels.len(), &spellings, &shares))
}

/// Sums over spellings; a longer spelling's share is taken from the longest one that it begins with.
fn apart(n: usize, spellings: &[(usize, Vec<u32>)], shares: &[f64]) -> Vec<f64> {
    let mut own = shares.to_vec();
    for ((_, ids), share) in spellings.iter().zip(shares) {
        let begins = |(_, (_, other)): &(usize, &(usize, Vec<u32>))| other.len() < ids.len() && ids.starts_with(other);
        let longest = spellings.iter().enumerate().filter(begins).max_by_key(|(_, (_, other))| other.len());
        if let Some((place, _)) = longest {
            own[place] -= share;
        }
    }
    let mut sums = vec![0.0; n];
    spellings.iter().zip(own).for_each(|((label, _), share)| sums[*label] += share.max(0.0));
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_text_is_not_the_one_that_it_begins_with() {
        // 1, 10 and 100 in tokens of one digit, and 1 with a space before it.
        let spellings = vec![(0, vec![1]), (1, vec![1, 0]), (2, vec![1, 0, 0]), (0, vec![9])];
        let found = apart(3, &spellings, &[0.5, 0.3, 0.1, 0.05]);
        let expected = [0.2 + 0.05, 0.2, 0.1];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
    }
}
