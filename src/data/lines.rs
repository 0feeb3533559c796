//! Lines of a dataset, one at a time, in constant memory.

use std::io::{self, BufRead, ErrorKind};

use super::Fault;

const BOM: &[u8] = b"\xEF\xBB\xBF";

/// Reads lines with their numbers. Blank lines are counted and passed over; a byte order mark is tolerated at the
/// start of the file; CRLF ends a line as LF does.
pub struct Lines<R> {
    reader: R,
    max_bytes: usize,
    number: u64,
    buffer: Vec<u8>,
}

/// What became of one line.
pub struct Line<'a> {
    /// From 1.
    pub number: u64,
    pub text: Result<&'a str, Fault>,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R, max_bytes: usize) -> Self {
        Self { reader, max_bytes, number: 0, buffer: Vec::new() }
    }

    /// The next line that is not blank, or none at the end.
    pub fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            let Some(bytes) = self.fill()? else { return Ok(None) };
            self.number += 1;
            if self.number == 1 && self.buffer.starts_with(BOM) {
                self.buffer.drain(..BOM.len());
            }
            if bytes > self.max_bytes || !self.buffer.trim_ascii().is_empty() {
                let text = if bytes > self.max_bytes {
                    let message = format!("the line has {bytes} bytes, above the limit of {}", self.max_bytes);
                    Err(Fault::new("line_too_long", message))
                } else {
                    text_of(&self.buffer)
                };
                return Ok(Some(Line { number: self.number, text }));
            }
        }
    }

    /// Reads up to the next line feed. Answers the line's length; keeps nothing of a line that is too long.
    fn fill(&mut self) -> io::Result<Option<usize>> {
        self.buffer.clear();
        let mut bytes = 0;
        let mut is_at_end = true;
        loop {
            let chunk = match self.reader.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            if chunk.is_empty() {
                return Ok((!is_at_end).then_some(bytes));
            }
            is_at_end = false;
            let end = chunk.iter().position(|b| *b == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            bytes += part.len();
            if bytes <= self.max_bytes {
                self.buffer.extend_from_slice(part);
            } else {
                self.buffer = Vec::new();
            }
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(Some(bytes));
            }
        }
    }
}

fn text_of(bytes: &[u8]) -> Result<&str, Fault> {
    std::str::from_utf8(bytes)
        .map_err(|e| Fault::new("invalid_utf8", format!("byte {} of the line is not UTF-8", e.valid_up_to() + 1)))
}
