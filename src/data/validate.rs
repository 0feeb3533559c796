//! One pass over a dataset: a report for its owner, or examples for a job.

use std::{
    collections::{BTreeMap, HashSet},
    io::{BufRead, Cursor},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Context, DataError, Example, Fault, Format, MAX_ROWS, Mark, Reading, Record, Row, lines, record, render};
use crate::domain::{
    FileReport,
    dataset::{HistogramBin, LabelCount, RenderedExample, RowKind},
    spec::MAX_LABELS,
};

/// Errors that a report shows; the others are counted.
const MAX_ERRORS: usize = 50;
/// Rendered examples in a report.
const MAX_EXAMPLES: usize = 3;

/// Reads all rows and says what a job on this base would make of them. Memory does not grow with the file but for
/// 16 bytes a row. The caller fills in `file_id`.
pub fn validate(reader: impl BufRead, context: &Context) -> Result<FileReport, DataError> {
    let report = FileReport {
        model: context.base_id.to_owned(),
        max_seq_len: context.max_seq_len as u64,
        ..FileReport::default()
    };
    survey(reader, Some(context), report)
}

/// The same without a base: formats, fields and roles only; all token counts stay 0.
pub fn check_structure(reader: impl BufRead) -> Result<FileReport, DataError> {
    survey(reader, None, FileReport::default())
}

/// Every row, too long ones included (without labels): the trainer counts them and leaves them out.
/// The first row that is not valid is an error.
pub fn load(reader: impl BufRead, context: &Context) -> Result<Vec<Row>, DataError> {
    let mut rows = Vec::new();
    each_row(reader, |line, row| {
        let row = row.and_then(|(_, record)| render::row(line, &record, context));
        rows.push(row.map_err(|fault| DataError::Line(fault.at(line)))?);
        Ok(())
    })?;
    if rows.is_empty() { Err(DataError::Empty) } else { Ok(rows) }
}

/// A text to be read by an adapter's head: as a row of a training file has it, but without what it is called.
pub fn question(value: Value, context: &Context) -> Result<Reading, DataError> {
    let at = |fault: Fault| DataError::Line(fault.at(1));
    let text = value.to_string();
    if let Some(reading) = render::reading(value, context).map_err(at)? {
        return Ok(reading);
    }
    match load(Cursor::new(text), context)?.as_slice() {
        [Row::Example(text)] => Ok(Reading {
            kind: RowKind::Examples,
            ids: text.ids.clone(),
            spans: std::iter::once(0..text.ids.len()).collect(),
        }),
        _ => Err(at(Fault::new(
            "invalid_input",
            "a text is an object with text, with tokens, with messages, or with prompt and completion",
        ))),
    }
}

fn survey(reader: impl BufRead, context: Option<&Context>, report: FileReport) -> Result<FileReport, DataError> {
    let mut survey = Survey { report, seen: HashSet::new(), bins: [0; 65], labels: BTreeMap::new() };
    each_row(reader, |line, row| {
        survey.report.rows += 1;
        if let Err(fault) = row.and_then(|(format, record)| survey.row(line, format, &record, context)) {
            survey.fault(line, fault);
        }
        Ok(())
    })?;
    if survey.report.rows == 0 {
        survey.fault(1, Fault::new("empty_file", "the file has no rows"));
    }
    Ok(survey.finish())
}

/// Calls `each` with every row, or with what is wrong with it. The first row's format is the file's.
pub(super) fn each_row(
    reader: impl BufRead,
    mut each: impl FnMut(u64, Result<(Format, Record), Fault>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut lines = lines(reader);
    let mut first: Option<(Format, u64)> = None;
    let mut rows = 0;
    while let Some(line) = lines.next()? {
        rows += 1;
        if rows > MAX_ROWS {
            let message = format!("the file has more than {MAX_ROWS} rows");
            return each(line.number, Err(Fault::new("too_many_rows", message)));
        }
        let number = line.number;
        let row = line.text.and_then(|text| {
            let object = record::object(text)?;
            let format = Format::of(&object)?.within(first.map(|(format, _)| format), &object);
            let (expected, since) = *first.get_or_insert((format, number));
            if format != expected {
                let (this, that) = (format.as_str(), expected.as_str());
                let message = format!("a row of format {this} in a file of format {that} (since line {since})");
                return Err(Fault::new("mixed_formats", message));
            }
            Record::parse(format, object).map(|record| (format, record))
        });
        each(number, row)?;
    }
    Ok(())
}

struct Survey {
    report: FileReport,
    /// The first 128 bits of each row's hash: with a million rows, two different ones agree with a chance of 1e-27.
    seen: HashSet<[u8; 16]>,
    /// Rows by the bits of their length: bin `b` counts `[2^(b-1), 2^b)`.
    bins: [u64; 65],
    /// Each label's count and first line.
    labels: BTreeMap<String, (u64, u64)>,
}

impl Survey {
    fn row(&mut self, line: u64, format: Format, record: &Record, context: Option<&Context>) -> Result<(), Fault> {
        self.report.format.get_or_insert_with(|| format.as_str().to_owned());
        let row = context.map(|context| render::row(line, record, context)).transpose()?;
        if !self.seen.insert(fingerprint(record)?) {
            self.report.duplicate_rows += 1;
        }
        match (context, row) {
            (Some(context), Some(row)) => self.tokens(line, &row, context),
            _ => {
                self.report.usable_rows += 1;
                Ok(())
            }
        }
    }

    fn tokens(&mut self, line: u64, row: &Row, context: &Context) -> Result<(), Fault> {
        let report = &mut self.report;
        let length = row.longest() as u64;
        self.bins[(u64::BITS - length.leading_zeros()) as usize] += 1;
        report.longest_row = report.longest_row.max(length);
        if row.longest() > context.max_seq_len {
            report.too_long_rows += 1;
            return Ok(());
        }
        for example in row.examples() {
            if report.examples.len() < MAX_EXAMPLES {
                report.examples.push(rendered(example, row.marks(), context)?);
            }
        }
        for mark in row.marks() {
            let is_new = !self.labels.contains_key(&mark.label);
            if is_new && self.labels.len() == MAX_LABELS {
                let message = format!("`{}` is a label more than the limit of {MAX_LABELS}", mark.label);
                return Err(Fault::new("too_many_labels", message));
            }
            self.labels.entry(mark.label.clone()).or_insert((0, line)).0 += 1;
        }
        report.usable_rows += 1;
        report.tokens += row.tokens() as u64;
        report.trained_tokens += row.trained() as u64;
        Ok(())
    }

    fn fault(&mut self, line: u64, fault: Fault) {
        self.report.error_count += 1;
        if self.report.errors.len() < MAX_ERRORS {
            self.report.errors.push(fault.at(line));
        }
    }

    fn finish(mut self) -> FileReport {
        let bins = self.bins.iter().enumerate().filter(|(_, rows)| **rows > 0);
        let edge = |bits: usize| 1u64.checked_shl(bits as u32).unwrap_or(u64::MAX);
        self.report.histogram = bins
            .map(|(bits, rows)| HistogramBin {
                from: if bits == 0 { 0 } else { edge(bits - 1) },
                to: edge(bits),
                rows: *rows,
            })
            .collect();
        let label = |(label, (count, first_line))| LabelCount { label, count, first_line };
        self.report.labels = self.labels.into_iter().map(label).collect();
        self.report.object = "file.report".to_owned();
        self.report
    }
}

fn rendered(example: &Example, marks: &[Mark], context: &Context) -> Result<RenderedExample, Fault> {
    Ok(RenderedExample {
        line: example.line,
        text: render::text(&example.ids, context)?,
        trained_text: match marks {
            [] => render::trained_text(example, context)?,
            marks => marks.iter().map(|mark| mark.label.clone()).collect(),
        },
        tokens: example.ids.len() as u64,
        trained_tokens: (example.trained() + marks.len()) as u64,
    })
}

fn fingerprint(record: &Record) -> Result<[u8; 16], Fault> {
    let bytes = serde_json::to_vec(record).map_err(|e| Fault::new("invalid_json", e.to_string()))?;
    let hash = Sha256::digest(&bytes);
    let mut short = [0; 16];
    short.copy_from_slice(&hash[..16]);
    Ok(short)
}
