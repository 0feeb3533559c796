//! Identifiers: a prefix and random letters.

const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// `new("file-")` is `file-` and 24 random letters and digits (142 bits).
pub fn new(prefix: &str) -> String {
    format!("{prefix}{}", random(24))
}

/// `n` random letters and digits from the operating system.
pub fn random(n: usize) -> String {
    let mut text = String::with_capacity(n);
    let mut bytes = [0u8; 64];
    while text.len() < n {
        getrandom::fill(&mut bytes).expect("the operating system has no random numbers");
        // 248 = 4 · 62: larger bytes would favour the first letters.
        let letters =
            bytes.iter().filter(|b| **b < 248).map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()]));
        text.extend(letters.take(n - text.len()));
    }
    text
}
