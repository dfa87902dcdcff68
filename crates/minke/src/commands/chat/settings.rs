//! What `/set` and `/think` show and change.

use minke_data::Thinking;
use minke_infer::Settings;

const NAMES: &str = "temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, \
                     frequency_penalty, seed, max_tokens";

/// Applies a value in a context of so many tokens; on an error nothing is changed.
pub fn change(settings: &mut Settings, name: &str, value: &str, context: usize) -> Result<(), String> {
    let number = || value.parse::<f32>().map_err(|_| format!("{name}: expected a number, got `{value}`"));
    let whole =
        || value.parse::<u64>().map_err(|_| format!("{name}: expected a whole number, got `{value}`"));
    let mut new = settings.clone();
    let sampling = &mut new.sampling;
    match name {
        "temperature" => sampling.temperature = number()?,
        "top_k" => sampling.top_k = whole()? as usize,
        "top_p" => sampling.top_p = number()?,
        "min_p" => sampling.min_p = number()?,
        "typical_p" => sampling.typical_p = number()?,
        "repetition_penalty" => sampling.repetition_penalty = number()?,
        "presence_penalty" => sampling.presence_penalty = number()?,
        "frequency_penalty" => sampling.frequency_penalty = number()?,
        "seed" => sampling.seed = whole()?,
        "max_tokens" | "tokens" if value == "none" => new.max_tokens = None,
        "max_tokens" | "tokens" => {
            let most = context as u64 - 1;
            let n = Some(whole()?).filter(|n| (1..=most).contains(n)).ok_or_else(|| {
                format!("{name}: expected none, or 1 to {most}, the model's context less one, got {value}")
            })?;
            new.max_tokens = Some(n as usize);
        }
        _ => return Err(format!("unknown setting `{name}`; there are {NAMES}")),
    }
    new.sampling.validate().map_err(|error| error.to_string())?;
    *settings = new;
    Ok(())
}

/// How it thinks, in words.
pub fn thinking(settings: &Settings) -> String {
    match (settings.thinking, settings.thinking_budget) {
        (Thinking::Empty, _) => "off".to_owned(),
        (Thinking::Default, None) => "auto".to_owned(),
        (Thinking::Open, None) => "on".to_owned(),
        (_, Some(n)) => format!("on, at most {n} tokens"),
    }
}

/// All settings on a line; penalties and the like where they do something.
pub fn shown(settings: &Settings) -> String {
    let s = &settings.sampling;
    let mut out = format!(
        "temperature={} top_k={} top_p={} min_p={} seed={} max_tokens={}",
        s.temperature,
        s.top_k,
        s.top_p,
        s.min_p,
        s.seed,
        settings.max_tokens.map_or_else(|| "none".to_owned(), |n| n.to_string()),
    );
    for (name, value, plain) in [
        ("typical_p", s.typical_p, 1.0),
        ("repetition_penalty", s.repetition_penalty, 1.0),
        ("presence_penalty", s.presence_penalty, 0.0),
        ("frequency_penalty", s.frequency_penalty, 0.0),
    ] {
        if value != plain {
            out.push_str(&format!(" {name}={value}"));
        }
    }
    if settings.thinking != Thinking::Default || settings.thinking_budget.is_some() {
        out.push_str(&format!(" think={}", thinking(settings)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::think;
    use super::*;

    #[test]
    fn changes_are_checked() {
        let mut settings = Settings { max_tokens: Some(10), ..Settings::default() };
        for (name, value) in
            [("temperature", "0.5"), ("top_k", "40"), ("max_tokens", "63"), ("repetition_penalty", "1.1")]
        {
            change(&mut settings, name, value, 64).unwrap();
        }
        let good = settings.clone();
        for (name, value, why) in [
            ("temperature", "", "expected a number"),
            ("temperature", "-1", "from 0 to 100"),
            ("temperature", "hot", "expected a number"),
            ("top_k", "1.5", "whole number"),
            ("max_tokens", "64", "1 to 63"),
            ("tokens", "0", "1 to 63"),
            ("typical_p", "2", "at most 1"),
            ("colour", "red", "unknown setting `colour`"),
        ] {
            let error = change(&mut settings, name, value, 64).unwrap_err();
            assert!(error.contains(why), "{name}: {error}");
        }
        assert_eq!(settings, good);
        assert_eq!(
            shown(&good),
            "temperature=0.5 top_k=40 top_p=1 min_p=0 seed=0 max_tokens=63 repetition_penalty=1.1"
        );
        think(&mut settings, "200").unwrap();
        assert_eq!((settings.thinking, settings.thinking_budget), (Thinking::Open, Some(200)));
        think(&mut settings, "budget 30").unwrap();
        assert_eq!(settings.thinking_budget, Some(30));
        assert!(think(&mut settings, "much").unwrap_err().contains("got `much`"));
        think(&mut settings, "off").unwrap();
        assert!(shown(&settings).ends_with("think=off"));
        think(&mut settings, "auto").unwrap();
        assert_eq!(settings, good);
    }
}
