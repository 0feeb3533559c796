//! Stop strings in a stream of text, also across pieces.

/// Holds back text that may turn out to be the beginning of a stop string.
#[derive(Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// The text that is certain now, and whether a stop string was found (nothing comes after it).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = (self.stops.iter()).map(|stop| longest_overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when nothing more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` that begins `stop`.
fn longest_overlap(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
    lengths.filter(|n| text.ends_with(&stop[..*n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_across_pieces_ends_the_text_before_it() {
        let mut matcher = StopMatcher::new(vec!["END".to_owned(), "né".to_owned()]);
        assert_eq!(matcher.push("abcE"), ("abc".to_owned(), false));
        assert_eq!(matcher.push("Nx"), ("ENx".to_owned(), false));
        assert_eq!(matcher.push("n"), (String::new(), false));
        assert_eq!(matcher.push("é!"), (String::new(), true));
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(text in "[ab]{0,40}", stop in "[ab]{1,4}", cuts in prop::collection::vec(0usize..41, 0..6)) {
            let mut matcher = StopMatcher::new(vec![stop.clone()]);
            let (mut out, mut start, mut stopped) = (String::new(), 0, false);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.sort_unstable();
            cuts.push(text.len());
            for cut in cuts {
                if stopped { break; }
                let (piece, found) = matcher.push(&text[start..cut]);
                out.push_str(&piece);
                (start, stopped) = (cut, found);
            }
            if !stopped { out.push_str(&matcher.finish()); }
            prop_assert_eq!(out, text.split(&stop).next().unwrap_or_default());
        }
    }
}
