//! Whose turn it is: the project that has had the least service goes first (virtual token counters, Sheng et al.,
//! arXiv 2401.00588). A project without requests saves up nothing: it joins at the level of the least served one.

use std::collections::HashMap;

/// What a generated token counts, beside 1 for one that is read.
const GENERATED: u64 = 2;

#[derive(Default)]
pub struct Fairness {
    served: HashMap<String, u64>,
}

impl Fairness {
    /// A request of `project` comes in; `active` are the projects that have requests already.
    pub fn join<'a>(&mut self, project: &str, active: impl Iterator<Item = &'a str> + Clone) {
        if active.clone().any(|other| other == project) {
            return;
        }
        let least = active.clone().map(|other| self.served(other)).min();
        let level = least.unwrap_or(0).max(self.served(project));
        self.served.insert(project.to_owned(), level);
        // Who has left for good is forgotten: it would join at the common level anyway.
        let floor = least.unwrap_or(level);
        self.served
            .retain(|name, level| name == project || *level > floor || active.clone().any(|other| other == name));
    }

    pub fn served(&self, project: &str) -> u64 {
        self.served.get(project).copied().unwrap_or(0)
    }

    pub fn charge(&mut self, project: &str, read: usize, generated: usize) {
        if let Some(served) = self.served.get_mut(project) {
            *served += read as u64 + GENERATED * generated as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_had_less_goes_first_and_idling_saves_up_nothing() {
        let mut fair = Fairness::default();
        fair.join("flood", std::iter::empty());
        fair.charge("flood", 100, 10);
        assert_eq!(fair.served("flood"), 120);
        fair.join("late", ["flood"].into_iter());
        assert_eq!(fair.served("late"), 120);
        fair.charge("flood", 1, 0);
        assert!(fair.served("late") < fair.served("flood"));
        // Coming back: not below the others, and not below where it was.
        fair.charge("late", 500, 0);
        fair.join("late", ["flood"].into_iter());
        assert_eq!(fair.served("late"), 620);
        fair.join("third", ["flood", "late"].into_iter());
        assert_eq!(fair.served("third"), 121);
    }

    #[test]
    fn those_who_left_are_forgotten() {
        let mut fair = Fairness::default();
        for i in 0..1000 {
            fair.join(&format!("p{i}"), std::iter::empty());
        }
        assert!(fair.served.len() < 3, "{}", fair.served.len());
    }
}
