//! `calculate_output`: arithmetic over the scores of other graders.
//!
//! Numbers, names, `+ - * / ^`, brackets, and `min max abs floor ceil sqrt exp log`.

use std::collections::BTreeMap;

use super::GradeError;

/// How deep brackets may stand in each other.
const DEPTH: usize = 64;

#[derive(Clone, Debug, PartialEq)]
pub enum Formula {
    Number(f64),
    Name(String),
    Call(String, Vec<Formula>),
}

impl Formula {
    pub fn parse(text: &str) -> Result<Self, GradeError> {
        let mut parser = Parser { rest: text.trim_start(), depth: 0 };
        let formula = parser.sum()?;
        if parser.rest.is_empty() { Ok(formula) } else { Err(parser.unexpected()) }
    }

    /// Its value, which may be infinite or no number; a name that is not there is an error.
    pub fn value(&self, names: &BTreeMap<String, f64>) -> Result<f64, GradeError> {
        Ok(match self {
            Formula::Number(number) => *number,
            Formula::Name(name) => {
                let missing = || GradeError(format!("the formula names {name}, which is no grader"));
                names.get(name).copied().ok_or_else(missing)?
            }
            Formula::Call(name, arguments) => {
                let values = arguments.iter().map(|argument| argument.value(names)).collect::<Result<Vec<_>, _>>()?;
                call(name, &values)?
            }
        })
    }
}

fn call(name: &str, values: &[f64]) -> Result<f64, GradeError> {
    match (name, values) {
        ("+", [a, b]) => Ok(a + b),
        ("-", [a, b]) => Ok(a - b),
        ("*", [a, b]) => Ok(a * b),
        ("/", [a, b]) => Ok(a / b),
        ("^", [a, b]) => Ok(a.powf(*b)),
        ("-", [a]) => Ok(-a),
        ("min", [first, rest @ ..]) => Ok(rest.iter().fold(*first, |a, b| a.min(*b))),
        ("max", [first, rest @ ..]) => Ok(rest.iter().fold(*first, |a, b| a.max(*b))),
        ("abs", [a]) => Ok(a.abs()),
        ("floor", [a]) => Ok(a.floor()),
        ("ceil", [a]) => Ok(a.ceil()),
        ("sqrt", [a]) => Ok(a.sqrt()),
        ("exp", [a]) => Ok(a.exp()),
        ("log", [a]) => Ok(a.ln()),
        _ => Err(GradeError(format!("the formula calls {name} with {} values", values.len()))),
    }
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl Parser<'_> {
    fn sum(&mut self) -> Result<Formula, GradeError> {
        self.chain(&['+', '-'], Self::product)
    }

    fn product(&mut self) -> Result<Formula, GradeError> {
        self.chain(&['*', '/'], Self::power)
    }

    /// Operators of one rank, from the left.
    fn chain(
        &mut self,
        operators: &[char],
        next: fn(&mut Self) -> Result<Formula, GradeError>,
    ) -> Result<Formula, GradeError> {
        let mut left = next(self)?;
        while let Some(operator) = operators.iter().find(|operator| self.take(**operator)) {
            left = Formula::Call(operator.to_string(), vec![left, next(self)?]);
        }
        Ok(left)
    }

    fn power(&mut self) -> Result<Formula, GradeError> {
        if self.take('-') {
            return Ok(Formula::Call("-".to_owned(), vec![self.deeper(Self::power)?]));
        }
        let base = self.atom()?;
        if self.take('^') {
            return Ok(Formula::Call("^".to_owned(), vec![base, self.deeper(Self::power)?]));
        }
        Ok(base)
    }

    fn atom(&mut self) -> Result<Formula, GradeError> {
        if self.take('(') {
            let inner = self.deeper(Self::sum)?;
            return if self.take(')') { Ok(inner) } else { Err(self.unexpected()) };
        }
        let word: String = self.rest.chars().take_while(|c| c.is_alphanumeric() || "_.".contains(*c)).collect();
        if word.is_empty() {
            return Err(self.unexpected());
        }
        self.rest = self.rest[word.len()..].trim_start();
        if word.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            let number = word.parse().map_err(|_| GradeError(format!("{word} in the formula is no number")))?;
            return Ok(Formula::Number(number));
        }
        if !self.take('(') {
            return Ok(Formula::Name(word));
        }
        let mut arguments = vec![self.deeper(Self::sum)?];
        while self.take(',') {
            arguments.push(self.deeper(Self::sum)?);
        }
        if self.take(')') { Ok(Formula::Call(word, arguments)) } else { Err(self.unexpected()) }
    }

    fn deeper(&mut self, next: fn(&mut Self) -> Result<Formula, GradeError>) -> Result<Formula, GradeError> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(GradeError(format!("the formula is more than {DEPTH} deep")));
        }
        let found = next(self);
        self.depth -= 1;
        found
    }

    fn take(&mut self, wanted: char) -> bool {
        let Some(rest) = self.rest.strip_prefix(wanted) else { return false };
        self.rest = rest.trim_start();
        true
    }

    fn unexpected(&self) -> GradeError {
        match self.rest.chars().next() {
            Some(c) => GradeError(format!("the formula has an unexpected {c:?}")),
            None => GradeError("the formula ends too early".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_are_arithmetic() {
        let names = BTreeMap::from([("a".to_owned(), 2.0), ("b_2".to_owned(), 0.5)]);
        for (text, expected) in [
            ("1 + 2 * 3 - 4 / 2", 5.0),
            ("a * (1 - b_2) ^ 2", 0.5),
            ("2 ^ 3 ^ 2", 512.0),
            ("-a ^ 2 + 10", 6.0),
            ("10 - 2 - 3", 5.0),
            ("max(a, b_2, 1.5) + min(a, 1) + abs(-3)", 6.0),
            ("sqrt(floor(4.9)) + ceil(0.1) + log(exp(1))", 4.0),
        ] {
            let found = Formula::parse(text).unwrap().value(&names).unwrap();
            assert!((found - expected).abs() < 1e-12, "{text}: {found}");
        }
        for text in ["", "1 +", "(1", "1)", "2 3", "a b", "1..2", "f(", "$", &"(".repeat(100)] {
            assert!(Formula::parse(text).is_err(), "{text}");
        }
        for text in ["c", "nothing(1)", "abs(1, 2)"] {
            assert!(Formula::parse(text).unwrap().value(&names).is_err(), "{text}");
        }
        for text in ["1 / 0", "log(-1)"] {
            assert!(!Formula::parse(text).unwrap().value(&names).unwrap().is_finite(), "{text}");
        }
    }
}
