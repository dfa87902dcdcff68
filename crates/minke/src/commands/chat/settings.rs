//! What `/set` shows and changes.

use std::fmt;

use minke_infer::Sampling;

/// How answers are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens of an answer.
    pub tokens: usize,
}

const NAMES: &str = "temperature, top_k, top_p, min_p, seed, tokens";

impl Settings {
    /// Applies `name=value` in a context of so many tokens; on an error nothing is changed.
    pub fn change(&mut self, change: &str, context: usize) -> Result<(), String> {
        let Some((name, value)) = change.split_once('=') else {
            return Err(format!("expected NAME=VALUE, got `{change}`"));
        };
        let (name, value) = (name.trim(), value.trim());
        let number = || value.parse::<f32>().map_err(|_| format!("{name}: expected a number, got `{value}`"));
        let whole =
            || value.parse::<u64>().map_err(|_| format!("{name}: expected a whole number, got `{value}`"));
        let mut new = *self;
        match name {
            "temperature" => new.sampling.temperature = number()?,
            "top_k" => new.sampling.top_k = whole()? as usize,
            "top_p" => new.sampling.top_p = number()?,
            "min_p" => new.sampling.min_p = number()?,
            "seed" => new.sampling.seed = whole()?,
            "tokens" => {
                let most = context as u64 - 1;
                new.tokens = Some(whole()?).filter(|n| (1..=most).contains(n)).ok_or_else(|| {
                    format!("tokens: expected 1 to {most}, the model's context less one, got {value}")
                })? as usize;
            }
            _ => return Err(format!("unknown setting `{name}`; there are {NAMES}")),
        }
        new.sampling.validate().map_err(|error| error.to_string())?;
        *self = new;
        Ok(())
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = self.sampling;
        let tokens = self.tokens;
        write!(
            f,
            "temperature={temperature} top_k={top_k} top_p={top_p} min_p={min_p} seed={seed} tokens={tokens}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_checked() {
        let mut settings = Settings { sampling: Sampling::default(), tokens: 10 };
        settings.change("temperature = 0.5", 64).unwrap();
        settings.change("top_k=40", 64).unwrap();
        settings.change("tokens=63", 64).unwrap();
        let good = settings;
        for (change, why) in [
            ("temperature", "expected NAME=VALUE"),
            ("temperature=-1", "from 0 to 100"),
            ("temperature=hot", "expected a number"),
            ("top_k=1.5", "whole number"),
            ("tokens=64", "1 to 63"),
            ("tokens=0", "1 to 63"),
            ("colour=red", "unknown setting `colour`"),
        ] {
            let error = settings.change(change, 64).unwrap_err();
            assert!(error.contains(why), "{change}: {error}");
        }
        assert_eq!(settings, good);
        assert_eq!(good.to_string(), "temperature=0.5 top_k=40 top_p=1 min_p=0 seed=0 tokens=63");
    }
}
