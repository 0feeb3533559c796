//! From a record to token ids and the mask of what is trained on.
//!
//! Stock chat templates do not mark what the assistant says, so the mask is found by prefix rendering: the
//! conversation up to a turn with the generation prompt, and up to and with the turn without it; the difference is
//! what the model has to say, its end-of-turn token included. A mask is never made from ids: in many bases the
//! padding token is the end token, and a mask by id would remove the end from the loss.

use std::ops::Range;

use serde_json::{Map, Value};

use super::{
    Answer, Chat, Completion, Context, Example, Fault, Judged, Mark, Marked, Pair, Prompt, Reading, Record, Row,
    labelled,
};
use crate::{domain::dataset::RowKind, text::ChatTemplate};

/// The row as an objective takes it. A text that is too long comes without labels: it is left out anyway, and the
/// prefixes of an endless conversation are not worth rendering.
pub fn row(line: u64, record: &Record, context: &Context) -> Result<Row, Fault> {
    let text = |answer: &Answer| match answer {
        Answer::Chat(chat) => example(line, chat_ids(chat, context)?, context),
        Answer::Completion(row) => example(line, completion_ids(row, context)?, context),
    };
    match record {
        Record::Chat(chat) => example(line, chat_ids(chat, context)?, context).map(Row::Example),
        Record::Completion(row) => example(line, completion_ids(row, context)?, context).map(Row::Example),
        Record::Tokens(row) => {
            check_ids(&row.ids, context)?;
            let example = Example { line, ids: row.ids.clone(), labels: row.labels.clone() };
            some_trained(example, context).map(Row::Example)
        }
        Record::Preference(preference) => {
            let (chosen, rejected) = (text(&preference.chosen)?, text(&preference.rejected)?);
            if chosen.ids == rejected.ids {
                return Err(Fault::new("equal_sides", "the two answers are the same tokens"));
            }
            Ok(Row::Pair(Pair { chosen, rejected, margin: preference.margin, probability: preference.probability }))
        }
        Record::Question(question) => {
            let chat = Chat { messages: question.messages.clone(), tools: question.tools.clone(), trained: Vec::new() };
            let ids = open_ids(&chat, context)?;
            check_ids(&ids, context)?;
            let text = unlabelled(line, ids);
            Ok(Row::Prompt(Prompt { text, item: question.item.clone() }))
        }
        Record::Labelled(row) => {
            let ids = text_ids(&row.text, context)?;
            let marks = vec![Mark { tokens: 0..ids.len(), label: row.label.clone() }];
            Ok(Row::Labelled(Marked { text: unlabelled(line, ids), marks }))
        }
        Record::Tagged(row) => {
            let (ids, spans) = word_ids(&row.words, context)?;
            let marks = spans.into_iter().zip(&row.tags).map(|(tokens, tag)| Mark { tokens, label: tag.clone() });
            let marks = marks.collect();
            Ok(Row::Tagged(Marked { text: unlabelled(line, ids), marks }))
        }
        Record::Judged(judgement) => {
            let example = text(&judgement.answer)?;
            Ok(Row::Judged(Judged { example, is_desirable: judgement.is_desirable }))
        }
    }
}

/// A text or words without what they are called, for an adapter that says it.
pub fn reading(row: Value, context: &Context) -> Result<Option<Reading>, Fault> {
    let mut row = match row {
        Value::String(text) => Map::from_iter([("text".to_owned(), Value::String(text))]),
        Value::Object(row) => row,
        _ => return Ok(None),
    };
    if row.contains_key("tokens") {
        super::record::only(&row, &["tokens"], "the text")?;
        let (ids, spans) = word_ids(&labelled::words(&mut row)?, context)?;
        return Ok(Some(Reading { kind: RowKind::Tagged, ids, spans }));
    }
    if row.contains_key("text") {
        super::record::only(&row, &["text"], "the text")?;
        let ids = text_ids(&labelled::some_text(&mut row)?, context)?;
        return Ok(Some(Reading { kind: RowKind::Labelled, spans: std::iter::once(0..ids.len()).collect(), ids }));
    }
    Ok(None)
}

fn unlabelled(line: u64, ids: Vec<u32>) -> Example {
    Example { line, labels: vec![None; ids.len()], ids }
}

fn text_ids(text: &str, context: &Context) -> Result<Vec<u32>, Fault> {
    let ids = with_bos(encode(text, context)?, context);
    check_ids(&ids, context)?;
    Ok(ids)
}

/// Words with a space between them, and the tokens of each. A token belongs to every word that it has a byte of.
fn word_ids(words: &[String], context: &Context) -> Result<(Vec<u32>, Vec<Range<usize>>), Fault> {
    let encoded = context.text.tokenizer.encode_spans(&words.join(" "));
    let encoded = encoded.map_err(|e| Fault::new("tokenizer_error", e.to_string()))?;
    let (ids, bytes): (Vec<u32>, Vec<Range<usize>>) = encoded.into_iter().unzip();
    let whole = with_bos(ids, context);
    check_ids(&whole, context)?;
    let before = whole.len() - bytes.len();
    let (mut spans, mut start, mut token) = (Vec::with_capacity(words.len()), 0, 0);
    for (i, word) in words.iter().enumerate() {
        let end = start + word.len();
        while bytes.get(token).is_some_and(|bytes| bytes.end <= start) {
            token += 1;
        }
        let after = bytes[token..].iter().position(|bytes| bytes.start >= end).map_or(bytes.len(), |n| token + n);
        if token == after {
            return Err(Fault::new("word_without_token", format!("token {i} has no token of the base's vocabulary")));
        }
        spans.push(before + token..before + after);
        start = end + 1;
    }
    Ok((whole, spans))
}

fn example(line: u64, (ids, spans): (Vec<u32>, Spans), context: &Context) -> Result<Example, Fault> {
    check_ids(&ids, context)?;
    let mut labels = vec![None; ids.len()];
    for (start, end) in spans {
        for place in start..end {
            labels[place] = Some(ids[place]);
        }
    }
    some_trained(Example { line, ids, labels }, context)
}

/// The runs of trained tokens, as text.
pub fn trained_text(example: &Example, context: &Context) -> Result<Vec<String>, Fault> {
    let is_same = |a: &Option<u32>, b: &Option<u32>| a.is_some() == b.is_some();
    example
        .labels
        .chunk_by(is_same)
        .filter(|run| run[0].is_some())
        .map(|run| text(&run.iter().flatten().copied().collect::<Vec<_>>(), context))
        .collect()
}

/// Text of ids, special tokens written out.
pub fn text(ids: &[u32], context: &Context) -> Result<String, Fault> {
    context.text.tokenizer.decode(ids, false).map_err(|e| Fault::new("tokenizer_error", e.to_string()))
}

type Spans = Vec<(usize, usize)>;

/// A conversation up to where its answer begins.
fn open_ids(chat: &Chat, context: &Context) -> Result<Vec<u32>, Fault> {
    let Some(template) = &context.text.template else {
        let message = format!("the base {} has no chat template: prompts cannot be rendered", context.base_id);
        return Err(Fault::new("no_template", message));
    };
    let text = rendered(template, &chat.messages, chat, true)?;
    Ok(with_bos(encode(&text, context)?, context))
}

fn chat_ids(chat: &Chat, context: &Context) -> Result<(Vec<u32>, Spans), Fault> {
    let Some(template) = &context.text.template else {
        let message = format!("the base {} has no chat template: use prompt and completion", context.base_id);
        return Err(Fault::new("no_template", message));
    };
    let tokens = |messages: &[Value], is_open: bool| -> Result<Vec<u32>, Fault> {
        let text = rendered(template, messages, chat, is_open)?;
        Ok(with_bos(encode(&text, context)?, context))
    };
    let whole = tokens(&chat.messages, false)?;
    if whole.len() > context.max_seq_len {
        return Ok((whole, Vec::new()));
    }
    let mut spans = Vec::with_capacity(chat.trained.len());
    for &turn in &chat.trained {
        let start = common(&tokens(&chat.messages[..turn], true)?, &whole);
        let is_last = turn + 1 == chat.messages.len();
        let closed = if is_last { whole.clone() } else { tokens(&chat.messages[..=turn], false)? };
        spans.push((start, end_of_turn(start, &closed, &whole, context)?));
    }
    Ok((whole, spans))
}

/// Where the turn that starts at `start` ends. Templates that write a turn otherwise once others follow it (Qwen3
/// drops earlier thoughts) are not prefixes of themselves: there the turn ends with the first stop token.
fn end_of_turn(start: usize, closed: &[u32], whole: &[u32], context: &Context) -> Result<usize, Fault> {
    let is_stop = |id: &u32| context.text.stop_ids.contains(id);
    let same = common(closed, whole).max(start);
    if same < closed.len() {
        return Ok(whole[start..].iter().position(is_stop).map_or(same, |length| start + length + 1));
    }
    // White space after the end-of-turn token is the template's: the model never has to write it.
    match whole[start..same].iter().rposition(is_stop).map(|length| start + length + 1) {
        Some(end) if text(&whole[end..same], context)?.trim().is_empty() => Ok(end),
        _ => Ok(same),
    }
}

fn completion_ids(row: &Completion, context: &Context) -> Result<(Vec<u32>, Spans), Fault> {
    let prompt = with_bos(encode(&row.prompt, context)?, context);
    let mut whole = with_bos(encode(&format!("{}{}", row.prompt, row.completion), context)?, context);
    let start = common(&prompt, &whole);
    let end = context.text.tokenizer.eos.or_else(|| context.text.stop_ids.first().copied());
    whole.extend(end);
    let spans = vec![(start, whole.len())];
    Ok((whole, spans))
}

fn rendered(template: &ChatTemplate, messages: &[Value], chat: &Chat, is_open: bool) -> Result<String, Fault> {
    template
        .render(messages, chat.tools.as_deref(), is_open)
        .map_err(|e| Fault::new("template_error", format!("the base's chat template refuses it: {e}")))
}

fn encode(text: &str, context: &Context) -> Result<Vec<u32>, Fault> {
    context.text.tokenizer.encode(text, true).map_err(|e| Fault::new("tokenizer_error", e.to_string()))
}

/// BOS in front, if the tokenizer wants one and the template did not write it.
fn with_bos(mut ids: Vec<u32>, context: &Context) -> Vec<u32> {
    if let Some(bos) = context.text.tokenizer.bos
        && ids.first() != Some(&bos)
    {
        ids.insert(0, bos);
    }
    ids
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn check_ids(ids: &[u32], context: &Context) -> Result<(), Fault> {
    match ids.iter().position(|id| usize::try_from(*id).map_or(true, |id| id >= context.vocab)) {
        None => Ok(()),
        Some(place) => {
            let message =
                format!("token {} at place {place} is outside the vocabulary of {}", ids[place], context.vocab);
            Err(Fault::new("token_out_of_range", message))
        }
    }
}

fn some_trained(example: Example, context: &Context) -> Result<Example, Fault> {
    if example.trained() == 0 && example.ids.len() <= context.max_seq_len {
        return Err(Fault::new("no_trained_tokens", "no token of the row is trained on"));
    }
    Ok(example)
}
