//! Composition root: the command line, and every role behind its subcommand.

mod apply;
mod args;
mod client;
mod dataplane_roles;
mod delete;
mod documents;
mod duration;
mod failure;
mod get;
mod image;
mod orchestrator;
mod progress;
mod roles;
mod serve;
mod standalone;
mod table;
mod volume;
mod why;

use std::process::ExitCode;

fn main() -> ExitCode {
    args::main()
}
