//! The `minke` command.
//!
//! Only this crate reads arguments and talks to a terminal. A command is a function from its arguments to
//! `Result<(), Failure>`; a [`Failure`](failure::Failure) knows its exit code (2 when the user can mend it, 1 otherwise)
//! and prints as one message. Figures go to standard output, everything else to standard error.

#![expect(
    clippy::format_push_string,
    clippy::format_collect,
    reason = "text for people is short, and format! reads better than write! and its result"
)]

mod cli;
mod commands;
mod failure;
mod interrupt;
mod output;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("MINKE_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let cli = cli::Cli::parse();
    match commands::run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
