//! What begins with a slash.

use std::path::PathBuf;

use minke_train::recipe::nearest;

/// A command at the prompt.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Lists the commands.
    Help,
    /// Shows or changes settings: name and value.
    Set(Option<(String, String)>),
    /// Whether and how long to think; nothing shows it.
    Think(Option<String>),
    /// Shows, changes or, with an empty text, takes away the instruction.
    System(Option<String>),
    /// Begins anew.
    Reset,
    /// Forgets the last turn.
    Undo,
    /// Answers the last turn again.
    Retry,
    /// Writes the conversation, over another if it is told so.
    Save(PathBuf, bool),
    /// Reads one.
    Load(PathBuf),
    /// Figures of the last answer.
    Stats,
    /// Leaves.
    Exit,
}

/// Names, arguments and what they do; `base` is what they do with a base model, where it is something else.
const LIST: [(&str, &str, &str, Option<&str>); 11] = [
    ("help", "", "this list", None),
    ("set", "[NAME VALUE]", "show the settings, or change one", None),
    ("think", "[on|off|auto|N]", "whether to think; N, or budget N, is at most N tokens", Some("")),
    ("system", "[TEXT]", "show or change the instruction; \"\" takes it away", Some("")),
    ("undo", "", "forget the last turn and its answer", None),
    ("retry", "", "answer the last turn again, by other random numbers", None),
    ("reset", "", "begin a new conversation; the instruction stays", Some("forget the text so far")),
    (
        "save",
        "FILE",
        "write the conversation (JSON); /save! over a file",
        Some("write the text (JSON); /save! over a file"),
    ),
    ("load", "FILE", "go on with the conversation of a file", Some("go on with the text of a file")),
    ("stats", "", "speed of the last answer, and how full the context is", None),
    ("exit", "", "leave (also Ctrl-D, or Ctrl-C twice)", None),
];

/// The list of commands.
pub fn help(is_base: bool) -> String {
    let mut out = String::new();
    for (name, arguments, does, base) in LIST {
        let does = if is_base { base.unwrap_or(does) } else { does };
        if !does.is_empty() {
            let call = format!("/{name} {arguments}");
            out.push_str(&format!("{:<24}{does}\n", call.trim_end()));
        }
    }
    out.push_str(
        "A turn is a line; a backslash at its end, \"\"\" before and after, or Alt-Enter\n\
         make it several. Ctrl-C stops an answer",
    );
    out.push_str(if is_base { "; an empty line lets the model go on." } else { "." });
    out
}

/// Commands that begin like a line.
pub fn completions(line: &str) -> Vec<String> {
    let Some(begin) = line.strip_prefix('/') else { return Vec::new() };
    LIST.iter().filter(|(name, ..)| name.starts_with(begin)).map(|(name, ..)| format!("/{name}")).collect()
}

/// The command that a turn is; none where it is a turn. Text may begin with a slash: only a plain word after it is a
/// command, and a mistyped one where it is alone or near to one.
///
/// # Errors
/// A command that is not known, or lacks its argument.
pub fn parse(turn: &str) -> Result<Option<Command>, String> {
    let turn = turn.trim();
    let (word, rest) = turn.split_once(char::is_whitespace).unwrap_or((turn, ""));
    let rest = rest.trim();
    let Some(name) = word.strip_prefix('/').filter(|name| !name.is_empty()) else { return Ok(None) };
    if name != "save!" && !name.chars().all(|c| c.is_ascii_lowercase()) {
        return Ok(None);
    }
    let given = || (!rest.is_empty()).then(|| rest.to_owned());
    let file = || match given() {
        Some(path) => minke_data::expand_path(&path),
        None => Err(format!("/{name} needs a file: /{name} FILE")),
    };
    Ok(Some(match name {
        "help" => Command::Help,
        "exit" | "quit" => Command::Exit,
        "reset" => Command::Reset,
        "undo" => Command::Undo,
        "retry" => Command::Retry,
        "stats" => Command::Stats,
        "save" | "save!" => Command::Save(file()?, name == "save!"),
        "load" => Command::Load(file()?),
        "think" => Command::Think(given()),
        "system" => Command::System(given().map(|text| text.trim_matches('"').to_owned())),
        "set" => Command::Set(match given() {
            None => None,
            Some(text) => {
                let pair = text.split_once('=').or_else(|| text.split_once(char::is_whitespace));
                let (key, value) =
                    pair.ok_or_else(|| format!("expected a name and a value, got `{text}`"))?;
                Some((key.trim().to_owned(), value.trim().to_owned()))
            }
        }),
        // a word alone is a mistyped command, a sentence is something to say, unless it begins as one
        _ => match nearest(name, &LIST.map(|(name, ..)| name)) {
            Some(near) => return Err(format!("unknown command `{word}`; is it /{near}?")),
            None if rest.is_empty() => {
                return Err(format!("unknown command `{word}`; /help lists the commands"));
            }
            None => return Ok(None),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_text() {
        let of = |turn: &str| parse(turn).unwrap();
        assert_eq!(of(" /exit "), Some(Command::Exit));
        let set = |name: &str, value: &str| Some(Command::Set(Some((name.into(), value.into()))));
        assert_eq!(of("/set temperature 0.5"), set("temperature", "0.5"));
        assert_eq!(of("/set temperature = 0.5"), set("temperature", "0.5"));
        assert_eq!(of("/set"), Some(Command::Set(None)));
        assert_eq!(
            of("/system be brief\nand kind"),
            Some(Command::System(Some("be brief\nand kind".into())))
        );
        assert_eq!(of("/system \"\""), Some(Command::System(Some(String::new()))));
        assert_eq!(of("/save a b.json"), Some(Command::Save("a b.json".into(), false)));
        assert_eq!(of("/save! a.json"), Some(Command::Save("a.json".into(), true)));
        for text in ["hello", "/", "/etc/passwd is a file", "/usr is large", "//x", "/Exit"] {
            assert_eq!(of(text), None, "{text}");
        }
        assert_eq!(parse("/exot").unwrap_err(), "unknown command `/exot`; is it /exit?");
        assert_eq!(parse("/sytem be brief").unwrap_err(), "unknown command `/sytem`; is it /system?");
        assert_eq!(parse("/whale").unwrap_err(), "unknown command `/whale`; /help lists the commands");
        assert!(parse("/save").unwrap_err().contains("/save FILE"));
        assert!(parse("/set x").unwrap_err().contains("a name and a value"));
        assert_eq!(completions("/s"), ["/set", "/system", "/save", "/stats"]);
        assert!(completions("s").is_empty());
    }

    #[test]
    fn help_fits_into_a_terminal() {
        for line in [true, false].map(help).iter().flat_map(|help| help.lines()) {
            assert!(line.len() <= 80, "{line}");
        }
    }
}
