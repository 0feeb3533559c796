//! Which of many kept things goes first: least recently used, with frequency (greedy dual). A thing's worth is the floor
//! when it was last used, and more the oftener it was used; the floor rises to the worth of whatever goes, so that old
//! fame fades.

/// When something was used, and how it compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Worth {
    points: u64,
    /// Among equals the one used last stays.
    used: u64,
}

impl Worth {
    pub fn used(self) -> u64 {
        self.used
    }
}

/// Counts uses, the clock of all worths.
#[derive(Debug, Default)]
pub struct Clock {
    now: u64,
    floor: u64,
}

impl Clock {
    /// The worth of something that is used now, for the `uses`th time.
    pub fn used(&mut self, uses: u64) -> Worth {
        self.now += 1;
        // Twice as often is one turn of the cache longer.
        Worth { points: self.floor + u64::from(u64::BITS - uses.leading_zeros()), used: self.now }
    }

    /// Something of this worth goes.
    pub fn gone(&mut self, worth: Worth) {
        self.floor = self.floor.max(worth.points);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_often_stays_longer_but_not_for_ever() {
        let mut clock = Clock::default();
        let famous = (1..=100).map(|uses| clock.used(uses)).last().unwrap();
        let mut turns = 0;
        loop {
            let once = clock.used(1);
            if famous < once {
                break;
            }
            clock.gone(once);
            turns += 1;
        }
        assert!((4..20).contains(&turns), "{turns}");
    }

    #[test]
    fn among_equals_the_older_goes() {
        let mut clock = Clock::default();
        let (a, b) = (clock.used(1), clock.used(1));
        assert!(a < b);
        let a = clock.used(2);
        assert!(a > b);
    }
}
