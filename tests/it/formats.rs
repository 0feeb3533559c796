//! Containers through their public readers: what is read, what is refused and how, and that nothing panics.

mod gguf;
mod safetensors;

use proptest::prelude::*;

/// How a file may be spoilt: bytes set at places of the header, or the end cut off.
#[derive(Clone, Debug)]
struct Damage {
    flips: Vec<(prop::sample::Index, u8)>,
    keep: Option<prop::sample::Index>,
}

fn damage() -> impl Strategy<Value = Damage> {
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let keep = prop::option::weighted(0.3, any::<prop::sample::Index>());
    (flips, keep).prop_map(|(flips, keep)| Damage { flips, keep })
}

impl Damage {
    fn apply(&self, bytes: &[u8]) -> Vec<u8> {
        let mut spoilt = bytes.to_vec();
        for (place, byte) in &self.flips {
            let at = place.index(spoilt.len());
            spoilt[at] = *byte;
        }
        if let Some(keep) = &self.keep {
            spoilt.truncate(keep.index(bytes.len()));
        }
        spoilt
    }
}
