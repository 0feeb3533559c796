//! A language of letters, from a seed. A prompt is five letters. An answer is three letters or more, each with a mood of
//! its own: how likely it is that its next letter is a vowel. Half of the consonants follow from the letter before; one
//! letter in thirty is a q.

use crate::tiny::Random;

const VOWELS: &[u8] = b"aeiou";
const CONSONANTS: &[u8] = b"bcdfghjklmnprstvwxyz";
const RARE: u32 = b'q' as u32;
const END: u32 = 258;
/// The longest answer of the language, without its end.
const LONGEST: usize = 20;

pub fn is_vowel(id: u32) -> bool {
    VOWELS.iter().any(|vowel| u32::from(*vowel) == id)
}

pub fn is_rare(id: u32) -> bool {
    id == RARE
}

/// The share of an answer's letters that are such.
pub fn share(answer: &[u32], is_such: impl Fn(u32) -> bool) -> f64 {
    let letters = answer.iter().filter(|id| **id < 256).count();
    answer.iter().filter(|id| is_such(**id)).count() as f64 / letters.max(1) as f64
}

/// What judges like.
pub fn vowels(answer: &[u32]) -> f64 {
    share(answer, is_vowel)
}

/// Where a letter stands when the alphabet is written in rows of four.
pub fn row(id: u32) -> Option<u32> {
    (u32::from(b'a')..=u32::from(b'z')).contains(&id).then(|| (id - u32::from(b'a')) / 4)
}

pub fn prompt(random: &mut Random) -> Vec<u32> {
    (0..5).map(|_| u32::from(b'a') + random.below(26) as u32).collect()
}

pub fn answer(random: &mut Random, prompt: &[u32]) -> Vec<u32> {
    let mood = 0.05 + 0.5 * random.uniform();
    let mut before = prompt.last().copied().unwrap_or_default() as usize;
    let mut answer = Vec::new();
    while answer.len() < 3 || (answer.len() < LONGEST && random.uniform() < 0.86) {
        let letter = if random.uniform() < mood {
            VOWELS[random.below(5)].into()
        } else if random.uniform() < 0.05 {
            RARE
        } else if random.uniform() < 0.5 {
            CONSONANTS[(7 * before + 5 * random.below(3)) % CONSONANTS.len()].into()
        } else {
            CONSONANTS[random.below(CONSONANTS.len())].into()
        };
        before = letter as usize;
        answer.push(letter);
    }
    answer.push(END);
    answer
}
