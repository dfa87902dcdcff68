//! From a task to the tokens that a model is given, and from its text back to an answer.

use minke_data::Tokenizer;
use minke_data::template::{ChatTemplate, Message, Thinking};
use minke_gym::Task;
use minke_gym::answer::{self, Parts, THINK};

use crate::error::Result;
use crate::worked;

/// In which form tasks are put.
#[derive(Debug, Clone)]
pub enum Form {
    /// As a message of the user, by the model's template.
    Chat {
        /// The template.
        template: ChatTemplate,
        /// How the model's turn begins.
        thinking: Thinking,
    },
    /// For base models: the prompt and a line feed; the answer is the line that follows.
    Plain,
    /// As worked problems stand in training text: `Q: prompt`, then `T:` thought and `A:` answer.
    Worked {
        /// Whether the model may think; without, `T:` stays empty and it goes on after `A:`.
        think: bool,
    },
}

/// Puts tasks in a form.
#[derive(Debug, Clone)]
pub struct Prompter {
    form: Form,
    bos: Option<u32>,
    /// Whether prompts end within an open thought.
    open: bool,
}

impl Prompter {
    /// A prompter; `bos` begins texts that no template begins.
    ///
    /// # Errors
    /// What the template or the tokenizer refuses.
    pub fn new(form: Form, bos: Option<u32>, tokenizer: &Tokenizer) -> Result<Self> {
        let open = match &form {
            Form::Chat { template, thinking } => {
                let ids = template.encode_prompt(tokenizer, &[Message::user("1+1=?")], *thinking)?;
                tokenizer.decode(&ids, false).trim_end().ends_with(THINK)
            }
            Form::Plain | Form::Worked { .. } => false,
        };
        Ok(Self { form, bos, open })
    }

    /// By the template if there is one, else plain; `think: false` begins the answer at once.
    ///
    /// # Errors
    /// As [`Prompter::new`].
    pub fn of(
        template: Option<&ChatTemplate>,
        thinking: Thinking,
        bos: Option<u32>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let form =
            template.map_or(Form::Plain, |template| Form::Chat { template: template.clone(), thinking });
        Self::new(form, bos, tokenizer)
    }

    /// Whether prompts end within an open thought.
    pub fn opens(&self) -> bool {
        self.open
    }

    /// The form.
    pub fn form(&self) -> &Form {
        &self.form
    }

    /// Names the form for reports, and so that logs of different forms are told apart.
    pub fn name(&self) -> String {
        match &self.form {
            Form::Chat { template, thinking } => {
                let source = blake3::hash(template.source().as_bytes()).to_hex();
                let thinking = match thinking {
                    Thinking::Default => "",
                    Thinking::Open => ", thinking",
                    Thinking::Empty => ", without thinking",
                };
                format!("chat ({}){thinking}", &source[..8])
            }
            Form::Plain => "plain".to_owned(),
            Form::Worked { think: true } => "worked".to_owned(),
            Form::Worked { think: false } => "worked, without thinking".to_owned(),
        }
    }

    /// The tokens of a task.
    ///
    /// # Errors
    /// What the template or the tokenizer refuses.
    pub fn prompt(&self, tokenizer: &Tokenizer, task: &Task) -> Result<Vec<u32>> {
        let text = match &self.form {
            Form::Chat { template, thinking } => {
                return Ok(template.encode_prompt(tokenizer, &[Message::user(&task.prompt)], *thinking)?);
            }
            Form::Plain => format!("{}\n", task.prompt),
            Form::Worked { think: true } => worked::question(&task.prompt),
            Form::Worked { think: false } => {
                format!("{}{}", worked::question(&task.prompt), worked::EMPTY_THOUGHT)
            }
        };
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(tokenizer.encode(&text)?);
        Ok(ids)
    }

    /// Strings that end an answer.
    pub fn stop(&self) -> Vec<String> {
        match self.form {
            Form::Chat { .. } => Vec::new(),
            Form::Plain | Form::Worked { think: false } => vec!["\n".to_owned()],
            Form::Worked { think: true } => vec!["\nQ:".to_owned()],
        }
    }

    /// Takes a model's text apart.
    pub fn split<'t>(&self, text: &'t str) -> Parts<'t> {
        match self.form {
            Form::Chat { .. } => answer::split(text, self.open),
            Form::Plain => answer::split(text, false),
            Form::Worked { think: true } => worked::split(text),
            Form::Worked { think: false } => {
                let answer = text.trim_start().strip_prefix("A:").unwrap_or(text).trim();
                Parts { thought: None, answer: (!answer.is_empty()).then_some(answer) }
            }
        }
    }
}
