//! From messages to tokens, and to which of them the model wrote.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value;

use super::thinking::{CLOSE, OPEN, fault};
use super::{ChatTemplate, Message, Names, RenderOptions, Role, Thinking, ToolCall};
use crate::{ControlToken, Error, Result, Tokenizer};

/// A conversation as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, with whatever begins a text by the template.
    pub ids: Vec<u32>,
    /// Whether the model wrote the token.
    pub mask: Vec<bool>,
    /// Turns of the assistant that are not marked, since the template does not tell them as they were written.
    pub untold: usize,
}

/// Where marks stand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marks {
    /// Behind each letter that a control token begins with: whatever a template cuts out of a text or puts beside it, no
    /// token comes of it.
    Starts,
    /// Behind whole control tokens, and before one that ends a text: a template that looks for `<tool_response>` at the
    /// begin of a turn and for `</tool_response>` at its end finds them.
    Around,
}

/// A conversation under its marks.
struct Shielded<'a> {
    shield: Shield<'a>,
    messages: Vec<Message>,
    tools: Vec<Value>,
    /// What the template makes of it.
    whole: String,
}

/// Marks where control tokens could begin in what people wrote.
#[derive(Clone)]
struct Shield<'a> {
    marks: Marks,
    mark: char,
    /// What says that the token behind it is text.
    before: char,
    tokens: &'a [ControlToken],
    /// First characters of control tokens.
    starts: HashSet<char>,
}

impl<'a> Shield<'a> {
    fn new(tokens: &'a [ControlToken], messages: &[Message], tools: &[Value]) -> Result<Self> {
        let private = |c: &char| matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{ffffd}');
        let mut taken: HashSet<char> = HashSet::new();
        let mut take = |text: &str| taken.extend(text.chars().filter(private));
        for message in messages {
            take(&message.content);
            for text in
                [&message.reasoning_content, &message.tool_call_id, &message.name].into_iter().flatten()
            {
                take(text);
            }
            for call in &message.tool_calls {
                take(&call.id);
                take(&call.name);
                texts(&call.arguments, &mut take);
            }
        }
        for tool in tools {
            texts(tool, &mut take);
        }
        let mut free =
            ('\u{e000}'..='\u{f8ff}').chain('\u{f0000}'..='\u{ffffd}').filter(|c| !taken.contains(c));
        let (Some(mark), Some(before)) = (free.next(), free.next()) else {
            let why = "the messages use every character of private use, so none is left";
            return Err(Error::template("(encoding)", why));
        };
        let starts = tokens.iter().filter_map(|token| token.content.chars().next()).collect();
        Ok(Self { marks: Marks::Starts, mark, before, tokens, starts })
    }

    fn over(&self, message: &Message) -> Message {
        let own = message.role == Role::Assistant;
        let plain = |text: &String| self.text(text, false);
        let call = |call: &ToolCall| ToolCall {
            id: plain(&call.id),
            name: plain(&call.name),
            arguments: self.value(&call.arguments),
        };
        Message {
            role: message.role,
            content: self.text(&message.content, own),
            reasoning_content: message.reasoning_content.as_deref().map(|text| self.text(text, own)),
            tool_calls: message.tool_calls.iter().map(call).collect(),
            tool_call_id: message.tool_call_id.as_ref().map(plain),
            name: message.name.as_ref().map(plain),
        }
    }

    /// JSON with all of its texts marked.
    fn value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.text(text, false).into(),
            Value::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Value::Object(fields) => {
                fields.iter().map(|(key, value)| (self.text(key, false), self.value(value))).collect()
            }
            other => other.clone(),
        }
    }

    /// `own` text keeps its marks of thinking.
    fn text(&self, text: &str, own: bool) -> String {
        let mut out = String::with_capacity(text.len() + 16);
        let mut rest = text;
        while let Some(letter) = rest.chars().next() {
            let kept = own && (rest.starts_with(OPEN) || rest.starts_with(CLOSE));
            let whole = if kept || self.marks == Marks::Starts || !self.starts.contains(&letter) {
                None
            } else {
                self.tokens.iter().find(|token| rest.starts_with(&token.content))
            };
            if let Some(token) = whole {
                let (token, behind) = rest.split_at(token.content.len());
                let ends = behind.trim().is_empty();
                out.extend(ends.then_some(self.before));
                out.push_str(token);
                out.extend((!ends).then_some(self.mark));
                rest = behind;
                continue;
            }
            let begins = match self.marks {
                Marks::Starts => self.starts.contains(&letter),
                // what comes behind the text could end it
                Marks::Around => self.tokens.iter().any(|token| token.content.starts_with(rest)),
            };
            out.push(letter);
            if begins && !kept {
                out.push(self.mark);
            }
            rest = &rest[letter.len_utf8()..];
        }
        out
    }

    fn without<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let marks = [self.mark, self.before];
        if text.contains(marks) { Cow::Owned(text.replace(marks, "")) } else { Cow::Borrowed(text) }
    }

    /// Whether a token at a place is what somebody wrote.
    fn is_text(&self, text: &str, at: usize, token: &ControlToken) -> bool {
        self.marks == Marks::Around
            && (text[..at].ends_with(self.before) || text[at + token.content.len()..].starts_with(self.mark))
    }

    /// The next control token and where it stands.
    fn next(&self, text: &str) -> Option<(usize, &'a ControlToken)> {
        text.char_indices().filter(|(_, letter)| self.starts.contains(letter)).find_map(|(at, _)| {
            let found = self.tokens.iter().find(|token| text[at..].starts_with(&token.content));
            found.filter(|token| !self.is_text(text, at, token)).map(|token| (at, token))
        })
    }

    /// Where the last control token of a text ends.
    fn last_end(&self, text: &str) -> Option<usize> {
        let mut end = None;
        while let Some((at, token)) = self.next(&text[end.unwrap_or(0)..]) {
            end = Some(end.unwrap_or(0) + at + token.content.len());
        }
        end
    }

    /// Appends the ids of a piece, `behind` others or what `ids` has.
    fn encode(&self, tokenizer: &Tokenizer, text: &str, behind: bool, ids: &mut Vec<u32>) -> Result<()> {
        let mut rest = text;
        loop {
            let found = self.next(rest);
            let mut plain = found.map_or(rest, |(at, _)| &rest[..at]);
            if found.is_some_and(|(_, token)| token.lstrip) {
                plain = plain.trim_end();
            }
            if !plain.is_empty() {
                let plain = self.without(plain);
                let begins = ids.is_empty() && !behind;
                ids.extend(if begins { tokenizer.encode(&plain) } else { tokenizer.encode_inside(&plain) }?);
            }
            let Some((at, token)) = found else { return Ok(()) };
            ids.push(token.id);
            rest = &rest[at + token.content.len()..];
            if token.rstrip {
                rest = rest.trim_start();
            }
        }
    }
}

impl Tokenizer {
    /// Encodes text in which control tokens are recognised and which stands behind other tokens, as what is written within
    /// an answer does.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_behind(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        Shield::new(self.control_tokens(), &[], &[])?.encode(self, text, true, &mut ids)?;
        Ok(ids)
    }
}

impl ChatTemplate {
    /// The tokens of a conversation, and which of them the model wrote.
    ///
    /// Text of the template may be control tokens, text of messages never is. A text is cut where the model began to
    /// write, so that the tokens before are those that it was given.
    ///
    /// # Errors
    /// What the template or the tokenizer refuses; a template that drops or doubles the thought of a marked answer.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: RenderOptions<'_>,
    ) -> Result<Encoded> {
        let names = self.names_of(tokenizer);
        let messages = self.prepared(messages);
        let Shielded { shield, messages: shielded, tools, whole } =
            self.shielded(tokenizer, &names, &messages, options)?;
        let options = RenderOptions { tools: &tools, ..options };
        let mut out = Encoded::default();
        let mut done = 0;
        for at in 0..shielded.len() {
            if shielded[at].role != Role::Assistant {
                continue;
            }
            let Some((begin, end)) = self.written(&names, &shielded, at, options, &whole, &shield)? else {
                out.untold += 1;
                continue;
            };
            if begin < done {
                // two turns of the assistant that the template tells as one
                out.untold += 1;
                continue;
            }
            out.push(&shield, tokenizer, &whole[done..begin], false)?;
            out.push(&shield, tokenizer, &whole[begin..end], true)?;
            done = end;
        }
        out.push(&shield, tokenizer, &whole[done..], false)?;
        Ok(out)
    }

    /// The tokens of the prompt for the model's next turn.
    ///
    /// # Errors
    /// As [`ChatTemplate::encode`].
    pub fn encode_prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        thinking: Thinking,
    ) -> Result<Vec<u32>> {
        self.encode_prompt_with(tokenizer, messages, RenderOptions::prompt(thinking))
    }

    /// The tokens of a conversation with tools and other variables; nothing is marked.
    ///
    /// # Errors
    /// As [`ChatTemplate::encode`].
    pub fn encode_prompt_with(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: RenderOptions<'_>,
    ) -> Result<Vec<u32>> {
        let names = self.names_of(tokenizer);
        let messages = self.prepared(messages);
        let Shielded { shield, whole, .. } = self.shielded(tokenizer, &names, &messages, options)?;
        let mut ids = Vec::new();
        shield.encode(tokenizer, &whole, false, &mut ids)?;
        Ok(ids)
    }

    /// A conversation under marks that do not change what the template makes of it, if there are such.
    fn shielded<'t>(
        &self,
        tokenizer: &'t Tokenizer,
        names: &Names,
        messages: &[Message],
        options: RenderOptions<'_>,
    ) -> Result<Shielded<'t>> {
        let mut shield = Shield::new(tokenizer.control_tokens(), messages, options.tools)?;
        let under = |shield: Shield<'t>| -> Result<Shielded<'t>> {
            let shielded: Vec<Message> = messages.iter().map(|message| shield.over(message)).collect();
            let tools: Vec<Value> = options.tools.iter().map(|tool| shield.value(tool)).collect();
            let whole = self.render_as(names, &shielded, RenderOptions { tools: &tools, ..options })?;
            Ok(Shielded { shield, messages: shielded, tools, whole })
        };
        let safest = under(shield.clone())?;
        let is = |other: &Shielded<'t>, plain: &str| other.shield.without(&other.whole) == plain;
        let Ok(plain) = self.render_as(names, messages, options) else { return Ok(safest) };
        if is(&safest, &plain) {
            return Ok(safest);
        }
        shield.marks = Marks::Around;
        Ok(under(shield).ok().filter(|around| is(around, &plain)).unwrap_or(safest))
    }

    /// The token that ends the model's turn, if it ends with one.
    ///
    /// # Errors
    /// What the template refuses.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Result<Option<u32>> {
        let probe = [Message::user("a"), Message::assistant(None, "b")];
        let encoded = self.encode(tokenizer, &probe, RenderOptions::default())?;
        let last = encoded.ids.iter().zip(&encoded.mask).rfind(|(_, written)| **written).map(|(id, _)| *id);
        let is_control = |id: &u32| tokenizer.control_tokens().iter().any(|token| token.id == *id);
        Ok(last.filter(is_control))
    }

    /// Names of control tokens that the template writes and the tokenizer does not have.
    pub fn missing_tokens(&self, tokenizer: &Tokenizer) -> Vec<String> {
        let probe = [Message::user("a"), Message::assistant(None, "b"), Message::user("c")];
        let options = RenderOptions::prompt(Thinking::Default);
        let Ok(text) = self.render_as(&self.names_of(tokenizer), &self.prepared(&probe), options) else {
            return Vec::new();
        };
        let mut missing: Vec<String> = Vec::new();
        for part in text.split('<').skip(1) {
            let Some(end) = part.find('>') else { continue };
            let name = format!("<{}>", &part[..end]);
            let bars = |c: char| c == '|' || c == '｜';
            let is_token =
                name == OPEN || name == CLOSE || part.starts_with(bars) && part[..end].ends_with(bars);
            if is_token && tokenizer.id_of(&name).is_none() && !missing.contains(&name) {
                missing.push(name);
            }
        }
        missing
    }

    /// Where in `whole` the model wrote the turn `at`; None where `whole` does not tell it as it was written.
    fn written(
        &self,
        names: &Names,
        shielded: &[Message],
        at: usize,
        options: RenderOptions<'_>,
        whole: &str,
        shield: &Shield<'_>,
    ) -> Result<Option<(usize, usize)>> {
        let plain = RenderOptions { add_generation_prompt: false, ..options };
        let is_last = at + 1 == shielded.len() && !options.add_generation_prompt;
        // a template may refuse a part of a conversation that it takes as a whole
        let through = if is_last {
            whole.len()
        } else {
            match self.render_as(names, &shielded[..=at], plain) {
                Ok(text) if whole.starts_with(&text) => text.len(),
                _ => return Ok(None),
            }
        };
        let mut begin = None;
        let mut shared = 0;
        for thinking in [options.thinking, Thinking::Default, Thinking::Empty, Thinking::Open] {
            let prompt = RenderOptions { add_generation_prompt: true, thinking, ..options };
            let Ok(prompt) = self.render_as(names, &shielded[..at], prompt) else {
                continue;
            };
            if whole[..through].starts_with(&prompt) {
                begin = Some(prompt.len());
                break;
            }
            shared = shared.max(common_prefix(&prompt, &whole[..through]));
        }
        // where the turn is begun otherwise, it begins behind the last control token that both ways share
        let Some(begin) = begin.or_else(|| shield.last_end(&whole[..shared])) else { return Ok(None) };
        let turn = &whole[begin..through];
        // what stands behind the end-of-turn token the template wrote, not the model
        let end = shield.last_end(turn).filter(|&end| turn[end..].trim().is_empty()).unwrap_or(turn.len());
        let thought = thought(&shielded[at]);
        if !thought.is_empty() {
            let before = self.render_as(names, &shielded[..at], plain).unwrap_or_default();
            let start = common_prefix(&before, whole).min(begin);
            if let Some(fault) = fault(&whole[start..begin + end], thought) {
                let hint = "choose another template, such as minke, deepseek-r1 or chatml";
                return Err(Error::template(self.place(), format!("{fault}; {hint}")));
            }
        }
        Ok(Some((begin, begin + end)))
    }
}

/// Every text within JSON.
fn texts(value: &Value, take: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => take(text),
        Value::Array(items) => items.iter().for_each(|item| texts(item, take)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            take(key);
            texts(value, take);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The thought of a prepared message.
fn thought(message: &Message) -> &str {
    if let Some(thought) = &message.reasoning_content {
        return thought;
    }
    let inside = message.content.trim_start().strip_prefix(OPEN).and_then(|rest| rest.split_once(CLOSE));
    inside.map_or("", |(thought, _)| thought.trim())
}

impl Encoded {
    fn push(&mut self, shield: &Shield<'_>, tokenizer: &Tokenizer, text: &str, written: bool) -> Result<()> {
        shield.encode(tokenizer, text, false, &mut self.ids)?;
        self.mask.resize(self.ids.len(), written);
        Ok(())
    }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
