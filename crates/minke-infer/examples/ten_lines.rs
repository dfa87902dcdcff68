//! A model in a program: `cargo run --release --example ten_lines -p minke-infer -- MODEL`.

use minke_infer::{Assistant, AssistantError};

fn main() -> Result<(), AssistantError> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "runs/tiny-r1".to_owned());
    let mut whale = Assistant::load(&model)?;
    whale.settings.sampling.temperature = 0.6;
    let answer = whale.say("What is 56365+18356?", |piece| print!("{piece}"))?;
    println!("\n{} tokens; without its thought it said: {}", answer.tokens, answer.text);
    let again = whale.ask("And 12+34?")?;
    println!("{}", again.text);
    Ok(())
}
