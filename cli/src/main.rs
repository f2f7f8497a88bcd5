//! Composition root: the command line, and every role behind its subcommand.

mod apply;
mod args;
mod client;
mod dataplane_roles;
mod delete;
mod documents;
mod duration;
mod engine_upgrade;
mod engines;
mod expand;
mod failure;
mod get;
mod image;
mod kubernetes;
mod orchestrator;
mod probe;
mod progress;
mod roles;
mod running;
mod serve;
mod standalone;
mod table;
mod volume;
mod web;
mod why;

use std::process::ExitCode;

/// What a shell reports of a program that SIGPIPE ended.
const PIPE_CLOSED: i32 = 141;

fn main() -> ExitCode {
    leave_quietly_when_nobody_reads();
    args::main()
}

/// `get … | head` closes our standard output early; printing panics then, which is no bug of ours.
fn leave_quietly_when_nobody_reads() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload_as_str().unwrap_or_default();
        if text.starts_with("failed printing to std") && text.contains("Broken pipe") {
            std::process::exit(PIPE_CLOSED);
        }
        usual(panic);
    }));
}
