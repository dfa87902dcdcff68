//! `minke gym`: the families of problems, some of them, and files of them.

use std::ops::ControlFlow;

use minke_gym::{Draw, Suite, families, problem};
use minke_post::worked::{self, Format, Mix, Settings};
use serde::Serialize;

use super::may_write;
use super::progress::Bar;
use crate::cli::{Gym, GymList, GymShow, GymWrite, LineFormat};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Runs the command.
pub fn run(gym: &Gym) -> Result<(), Failure> {
    match gym {
        Gym::List(args) => list(args),
        Gym::Show(args) => show(args),
        Gym::Write(args) => write(args),
    }
}

fn list(args: &GymList) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Line {
        name: &'static str,
        levels: u32,
        thoughts: bool,
        about: &'static str,
    }
    let lines: Vec<Line> = families()
        .iter()
        .map(|family| {
            let one = problem(*family, 1, minke_gym::Split::Train, 0, 0);
            let work = family.work(&one.key, minke_gym::Care::Full, &mut Draw::new(0, 0));
            Line {
                name: family.name(),
                levels: family.levels(),
                thoughts: work.is_some(),
                about: family.about(),
            }
        })
        .collect();
    if args.json {
        return output::json(&lines);
    }
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for line in &lines {
        let thoughts = if line.thoughts { "worked" } else { "" };
        text.push_str(&format!(
            "{:width$}  levels 1-{:<2}  {thoughts:6}  {}\n",
            line.name, line.levels, line.about
        ));
    }
    let core = minke_gym::CORE_LEVELS;
    text.push_str(&format!(
        "\nsuites: gym is all of them; core is {}, levels {}-{}\n",
        minke_gym::CORE.join(", "),
        core.start(),
        core.end()
    ));
    output::text(&text)
}

fn mix(care: &str) -> Result<Mix, Failure> {
    Mix::parse(care).map_err(|reason| Failure::user(format!("--care: {reason}")))
}

fn show(args: &GymShow) -> Result<(), Failure> {
    let suite = Suite::parse(&args.suite)?;
    let cells: u64 = suite.families().map(|(_, levels)| u64::from(levels.end() - levels.start() + 1)).sum();
    let settings = Settings {
        suite,
        count: cells * u64::from(args.count),
        mix: mix(&args.care)?,
        split: args.split.split(),
        seed: args.seed,
        format: Format::Text,
    };
    let mut problems: Vec<worked::Worked> = worked::problems(&settings)?.collect();
    // they come in rounds over families and levels; a person wants one family after the other
    let names: Vec<&str> = settings.suite.families().map(|(family, _)| family.name()).collect();
    problems.sort_by_key(|one| (names.iter().position(|name| *name == one.family), one.level));
    if args.json {
        return output::json(&problems);
    }
    let text: String =
        problems.iter().map(|one| format!("{} level {}\n{}\n", one.family, one.level, one.text())).collect();
    output::text(&text)
}

fn write(args: &GymWrite) -> Result<(), Failure> {
    may_write(&args.out, args.force)?;
    let settings = Settings {
        suite: Suite::parse(&args.suite)?,
        count: args.count,
        mix: mix(&args.care)?,
        split: args.split.split(),
        seed: args.seed,
        format: match args.format {
            LineFormat::Text => Format::Text,
            LineFormat::Chat => Format::Chat,
            LineFormat::Task => Format::Task,
        },
    };
    interrupt::install();
    let work = Work::begin();
    let mut bar = Bar::new("problems", args.json);
    let written = worked::write(&settings, &args.out, &mut |done, total| {
        bar.set(done, total, String::new);
        if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(bar);
    let Some(written) = written else { return Err(Failure::interrupted()) };
    if args.json {
        #[derive(Serialize)]
        struct Report<'a> {
            out: &'a std::path::Path,
            lines: u64,
            bytes: u64,
            without_thought: u64,
        }
        return output::json(&Report {
            out: &args.out,
            lines: written.lines,
            bytes: written.bytes,
            without_thought: written.without_thought,
        });
    }
    let mut text =
        format!("{}: {} lines, {}\n", args.out.display(), written.lines, output::bytes(written.bytes as f64));
    if written.without_thought > 0 {
        text.push_str(&format!(
            "{} of them have no thought, since their families have none to show\n",
            written.without_thought
        ));
    }
    output::text(&text)
}
