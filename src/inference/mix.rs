//! A mixture of adapters: a generation of its own, whose name says what it is made of. Whatever is keyed by generation
//! (memory, batches, caches) keeps mixtures apart without knowing of them.

/// Generations and their weights, in the order that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix(pub Vec<(String, f32)>);

impl Mix {
    /// None for the generation of a single adapter.
    pub fn parse(generation: &str) -> Option<Self> {
        let part = |part: &str| {
            let (generation, weight) = part.split_once('*')?;
            Some((generation.to_owned(), weight.parse().ok()?))
        };
        generation.split('+').map(part).collect::<Option<_>>().map(Self)
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        for (i, (generation, weight)) in self.0.iter().enumerate() {
            let plus = if i == 0 { "" } else { "+" };
            write!(f, "{plus}{generation}*{weight}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_is_made_of() {
        let weights = [0.7, -1.5e-7, 3.0, 1.0 / 3.0, f32::MAX, f32::MIN_POSITIVE];
        let mix = Mix(weights.iter().map(|weight| ("ab12".to_owned(), *weight)).collect());
        assert_eq!(Mix::parse(&mix.to_string()), Some(mix));
        assert_eq!(Mix(vec![("a".into(), 0.5), ("b".into(), -2.0)]).to_string(), "a*0.5+b*-2");
        assert_eq!(Mix::parse("ab12"), None);
        assert_eq!(Mix::parse(""), None);
    }
}
