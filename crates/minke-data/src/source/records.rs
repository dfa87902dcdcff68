//! What is inside one file: a whole text, pieces of a long one, lines of JSON, rows of Parquet.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::{PIECE_BYTES, Record, text_record};
use crate::error::guard;
use crate::{Error, Result};

/// The records of one open file.
#[derive(Debug)]
pub(crate) enum Records {
    One(Option<Record>),
    Pieces(TextPieces),
    JsonLines(JsonLines),
    // its reader is large
    Parquet(Box<ParquetColumn>),
}

impl Records {
    pub(crate) fn next(&mut self, path: &Path) -> Result<Option<Record>> {
        match self {
            Self::One(record) => Ok(record.take()),
            Self::Pieces(pieces) => pieces.next(path),
            Self::JsonLines(lines) => lines.next(path),
            Self::Parquet(column) => column.next(path),
        }
    }
}

/// A long text, cut at paragraph ends, else line ends, else between characters.
#[derive(Debug)]
pub(crate) struct TextPieces {
    reader: BufReader<File>,
    buffer: Vec<u8>,
}

impl TextPieces {
    pub(crate) fn new(reader: BufReader<File>, head: Vec<u8>) -> Self {
        Self { reader, buffer: head }
    }

    fn next(&mut self, path: &Path) -> Result<Option<Record>> {
        // one byte more than a piece shows whether this is the end
        let missing = (PIECE_BYTES + 1).saturating_sub(self.buffer.len()) as u64;
        let reader = self.reader.by_ref();
        reader.take(missing).read_to_end(&mut self.buffer).map_err(Error::io("read", path))?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let end = if self.buffer.len() <= PIECE_BYTES {
            self.buffer.len()
        } else {
            cut(&self.buffer[..PIECE_BYTES])
        };
        let rest = self.buffer.split_off(end);
        Ok(Some(text_record(std::mem::replace(&mut self.buffer, rest))))
    }
}

/// Where to cut a full piece; always at least half of it.
fn cut(piece: &[u8]) -> usize {
    let half = piece.len() / 2;
    let paragraph = piece.windows(2).rposition(|pair| pair == b"\n\n").map(|at| at + 2);
    let line = || piece.iter().rposition(|&b| b == b'\n').map(|at| at + 1);
    if let Some(at) = paragraph.filter(|&at| at > half).or_else(line).filter(|&at| at > half) {
        return at;
    }
    // a continuation byte at the border belongs to the character before it
    let mut at = piece.len();
    while at > piece.len() - 4 && at > half && piece[at - 1] & 0xC0 == 0x80 {
        at -= 1;
    }
    let lead = piece[at - 1];
    let complete = match lead {
        0xC0..=0xDF => piece.len() - at == 1,
        0xE0..=0xEF => piece.len() - at == 2,
        0xF0..=0xF7 => piece.len() - at == 3,
        _ => true,
    };
    if complete { piece.len() } else { at - 1 }
}

/// One JSON object per line.
#[derive(Debug)]
pub(crate) struct JsonLines {
    reader: BufReader<File>,
    field: String,
    limit_bytes: u64,
    line: u64,
}

impl JsonLines {
    pub(crate) fn open(path: &Path, field: &str, limit_bytes: u64) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        Ok(Self {
            reader: BufReader::with_capacity(1 << 18, file),
            field: field.to_owned(),
            limit_bytes,
            line: 0,
        })
    }

    fn next(&mut self, path: &Path) -> Result<Option<Record>> {
        // JSON may write one byte as six (`\u0041`), and there is room for the other keys
        let most = self.limit_bytes.saturating_mul(6).saturating_add(1 << 16);
        let mut bytes = Vec::new();
        self.line += 1;
        self.reader.by_ref().take(most).read_until(b'\n', &mut bytes).map_err(Error::io("read", path))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        if bytes.len() as u64 == most && bytes.last() != Some(&b'\n') {
            self.reader.skip_until(b'\n').map_err(Error::io("read", path))?;
            return Ok(Some(Record::TooLarge));
        }
        if bytes.trim_ascii().is_empty() {
            return Ok(Some(Record::Empty));
        }
        let fail =
            |reason: String| Error::Record { path: path.to_owned(), unit: "line", number: self.line, reason };
        let invalid = std::str::from_utf8(&bytes).is_err();
        let line = String::from_utf8_lossy(&bytes);
        let value: Value = serde_json::from_str(&line).map_err(|error| fail(format!("not JSON: {error}")))?;
        Ok(Some(match parts(&value, &self.field).map_err(fail)? {
            Parts::Text(text) => bounded(text.into_bytes(), invalid, self.limit_bytes),
            Parts::Pair { prompt, completion } => pair(prompt, completion, invalid, self.limit_bytes),
        }))
    }
}

fn bounded(bytes: Vec<u8>, invalid: bool, limit_bytes: u64) -> Record {
    if bytes.len() as u64 > limit_bytes {
        return Record::TooLarge;
    }
    match text_record(bytes) {
        Record::Text { text, prompt_bytes, invalid_utf8 } => {
            Record::Text { text, prompt_bytes, invalid_utf8: invalid_utf8 || invalid }
        }
        other => other,
    }
}

/// A prompt and what is to be learned behind it; without the latter there is nothing.
fn pair(prompt: &str, completion: &str, invalid: bool, limit_bytes: u64) -> Record {
    if completion.is_empty() {
        return Record::Empty;
    }
    let whole = [prompt, completion].concat();
    let whole_bytes = whole.len();
    match bounded(whole.into_bytes(), invalid, limit_bytes) {
        Record::Text { text, invalid_utf8, .. } => {
            // a byte-order mark at the beginning is gone
            let prompt_bytes = prompt.len().saturating_sub(whole_bytes - text.len());
            Record::Text { text, prompt_bytes, invalid_utf8 }
        }
        other => other,
    }
}

/// What a record says.
#[derive(Debug, PartialEq)]
enum Parts<'a> {
    Text(String),
    Pair { prompt: &'a str, completion: &'a str },
}

/// A record as a prompt with its completion where it has these as strings, and no text and no messages; else as plain
/// text.
fn parts<'a>(value: &'a Value, field: &str) -> Result<Parts<'a>, String> {
    let string = |key: &str| value.get(key).and_then(Value::as_str);
    let plain = value.get(field).is_some() || value.get("messages").is_some();
    match (string("prompt"), string("completion")) {
        (Some(prompt), Some(completion)) if !plain => Ok(Parts::Pair { prompt, completion }),
        _ => plain_text(value, field).map(Parts::Text),
    }
}

/// A record as plain text: its text, its messages, or its prompt followed by what answers it.
fn plain_text(value: &Value, field: &str) -> Result<String, String> {
    let Value::Object(record) = value else { return Err("expected an object".to_owned()) };
    if let Some(text) = record.get(field) {
        return text.as_str().map(str::to_owned).ok_or_else(|| format!("`{field}` is not a string"));
    }
    if let Some(messages) = record.get("messages") {
        return messages_text(messages);
    }
    let answer =
        record.get("completion").map(|text| (text, "")).or(record.get("answer").map(|text| (text, "\n\n")));
    if let (Some(prompt), Some((answer, between))) = (record.get("prompt"), answer) {
        let part = |value: &Value| match value {
            Value::String(text) => Ok((text.clone(), false)),
            other => messages_text(other).map(|text| (text, true)),
        };
        let ((prompt, chat), (answer, _)) = (part(prompt)?, part(answer)?);
        return Ok(format!("{prompt}{}{answer}", if chat { "\n\n" } else { between }));
    }
    let keys: Vec<&str> = record.keys().map(String::as_str).take(8).collect();
    Err(format!(
        "expected `{field}`, `messages`, or `prompt` with `completion` or `answer`, got the keys {}",
        if keys.is_empty() { "(none)".to_owned() } else { keys.join(", ").escape_debug().to_string() }
    ))
}

/// `role: content`, with an empty line between messages.
fn messages_text(messages: &Value) -> Result<String, String> {
    let Value::Array(messages) = messages else { return Err("`messages` is not a list".to_owned()) };
    let mut parts = Vec::with_capacity(messages.len());
    for message in messages {
        let role = message.get("role").and_then(Value::as_str).ok_or("a message has no `role`")?;
        let content = match message.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(pieces)) => {
                pieces.iter().filter_map(|piece| piece.get("text").and_then(Value::as_str)).collect()
            }
            Some(Value::Null) | None => continue,
            Some(_) => return Err("a message's `content` is neither text nor a list of parts".to_owned()),
        };
        parts.push(format!("{role}: {content}"));
    }
    Ok(parts.join("\n\n"))
}

/// One text column of a Parquet file, a few rows at a time.
pub(crate) struct ParquetColumn {
    reader: SerializedFileReader<File>,
    column: usize,
    optional: bool,
    next_group: usize,
    pages: Option<ColumnReaderImpl<ByteArrayType>>,
    rows: std::vec::IntoIter<ByteArray>,
    limit_bytes: u64,
    row: u64,
}

impl std::fmt::Debug for ParquetColumn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParquetColumn")
            .field("column", &self.column)
            .field("row", &self.row)
            .finish_non_exhaustive()
    }
}

impl ParquetColumn {
    pub(crate) fn open(path: &Path, field: &str, limit_bytes: u64) -> Result<Self> {
        let fail = |reason: String| Error::source(path.display().to_string(), reason);
        let file = File::open(path).map_err(Error::io("open", path))?;
        let reader = guard(|| SerializedFileReader::new(file))
            .map_err(&fail)?
            .map_err(|error| fail(format!("not a readable Parquet file: {error}")))?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let names = || schema.columns().iter().map(|column| column.path().string());
        let column = names().position(|name| name == field).ok_or_else(|| {
            let names: Vec<String> = names().take(16).collect();
            fail(format!("has no column `{field}` (set `text_field`); its columns: {}", names.join(", ")))
        })?;
        let descriptor = schema.column(column);
        if descriptor.physical_type() != PhysicalType::BYTE_ARRAY || descriptor.max_rep_level() != 0 {
            return Err(fail(format!("column `{field}` does not hold one text per row")));
        }
        let optional = descriptor.max_def_level() > 0;
        let rows = Vec::new().into_iter();
        Ok(Self { reader, column, optional, next_group: 0, pages: None, rows, limit_bytes, row: 0 })
    }

    fn next(&mut self, path: &Path) -> Result<Option<Record>> {
        loop {
            if let Some(bytes) = self.rows.next() {
                self.row += 1;
                return Ok(Some(bounded(bytes.data().to_vec(), false, self.limit_bytes)));
            }
            let number = self.row + 1;
            let fail = |reason: String| Error::Record { path: path.to_owned(), unit: "row", number, reason };
            let more = guard(|| self.read_rows()).map_err(fail)?.map_err(|error| fail(error.to_string()))?;
            if !more {
                return Ok(None);
            }
        }
    }

    /// Fills `rows`; false at the end of the file.
    fn read_rows(&mut self) -> parquet::errors::Result<bool> {
        const ROWS: usize = 64;
        loop {
            if let Some(pages) = &mut self.pages {
                let (mut values, mut levels) = (Vec::new(), Vec::new());
                let levels = self.optional.then_some(&mut levels);
                let (records, _, _) = pages.read_records(ROWS, levels, None, &mut values)?;
                if records > 0 {
                    self.rows = values.into_iter();
                    return Ok(true);
                }
                self.pages = None;
            }
            if self.next_group >= self.reader.num_row_groups() {
                return Ok(false);
            }
            let group = self.reader.get_row_group(self.next_group)?;
            self.next_group += 1;
            self.pages = match group.get_column_reader(self.column)? {
                ColumnReader::ByteArrayColumnReader(pages) => Some(pages),
                _ => {
                    return Err(parquet::errors::ParquetError::General(
                        "the column changed its type".to_owned(),
                    ));
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn records_become_plain_text() {
        let cases = [
            (json!({"text": "a"}), "a"),
            (json!({"prompt": "2+2?", "answer": "4"}), "2+2?\n\n4"),
            (
                json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}),
                "user: hi\n\nassistant: ho",
            ),
            (json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}), "user: x"),
            (
                json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "a", "content": "r"}]}),
                "user: q\n\na: r",
            ),
        ];
        for (value, expected) in cases {
            assert_eq!(plain_text(&value, "text").unwrap(), expected, "{value}");
        }
        for value in [
            json!([]),
            json!({"body": "x"}),
            json!({"text": 3}),
            json!({"messages": "x"}),
            json!({"prompt": "x"}),
        ] {
            assert!(plain_text(&value, "text").is_err(), "{value}");
        }
    }

    #[test]
    fn a_prompt_with_its_completion_stays_two_parts() {
        let both = json!({"prompt": "2+2=", "completion": "4", "level": 1});
        assert_eq!(parts(&both, "text").unwrap(), Parts::Pair { prompt: "2+2=", completion: "4" });
        for plain in [
            json!({"prompt": "2+2=", "completion": "4", "body": "x"}),
            json!({"prompt": "2+2=", "completion": "4", "messages": [{"role": "user", "content": "x"}]}),
            json!({"prompt": [{"role": "user", "content": "x"}], "completion": "4"}),
        ] {
            assert!(matches!(parts(&plain, "body").unwrap(), Parts::Text(text) if text.contains('x')));
        }
        assert!(parts(&json!({"prompt": "x", "completion": 4}), "text").is_err());
        let read = |prompt, completion| match pair(prompt, completion, false, 20) {
            Record::Text { text, prompt_bytes, .. } => {
                Some((text[..prompt_bytes].to_owned(), text[prompt_bytes..].to_owned()))
            }
            Record::TooLarge | Record::Empty => None,
        };
        let two = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(read("ä", "b"), two("ä", "b"));
        assert_eq!(read("", "b"), two("", "b"));
        assert_eq!(read("\u{feff}a", "b"), two("a", "b"));
        assert_eq!(read("", "\u{feff}b"), two("", "b"));
        assert_eq!([read("a", ""), read(" ", "\n"), read("0123456789", "0123456789x")], [None, None, None]);
    }

    #[test]
    fn pieces_never_cut_a_character() {
        let text = "ä€😀".repeat(4000);
        for length in [100, 101, 102, 103, 104, 105, 106, 107, 108] {
            let at = cut(&text.as_bytes()[..length]);
            assert!(text.is_char_boundary(at) && at > length / 2, "{length} {at}");
            assert!(length - at < 4);
        }
    }
}
