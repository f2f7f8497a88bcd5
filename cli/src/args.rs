//! The command line: what it takes and which part answers.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::client::Client;
use crate::failure::exit_code;
use crate::{apply, delete, get, image, volume, why};

/// Volumes that start as copy-on-write overlays on backing images.
#[derive(Parser, Debug)]
#[command(name = "backing-image-csi", version, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    command: Command,
}

/// Where the instance is.
#[derive(Args, Debug)]
struct Server {
    /// Address of the instance's HTTP API.
    #[arg(long, global = true, env = "BACKING_IMAGE_CSI_SERVER", default_value = "http://127.0.0.1:9500")]
    server: String,
    /// Namespace of our own objects.
    #[arg(long, global = true, env = "BACKING_IMAGE_CSI_SYSTEM_NAMESPACE", default_value = api::names::DEFAULT_NAMESPACE)]
    system_namespace: String,
}

#[derive(Subcommand, Debug)]
enum Command {
    Apply(apply::Apply),
    Get(get::Get),
    Delete(delete::Delete),
    #[command(subcommand)]
    Image(image::Image),
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    Why(why::Why),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

#[tokio::main]
async fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { server: Server { server, system_namespace }, command } = cli;
    let client = Client::new(&server)?;
    match command {
        Command::Apply(apply) => apply::run(&client, apply).await,
        Command::Get(get) => get::run(&client, get).await,
        Command::Delete(delete) => delete::run(&client, delete).await,
        Command::Image(image) => image::run(&client, image, &system_namespace).await,
        Command::Volume(command) => volume::run(&client, command, &system_namespace).await,
        Command::Why(why) => why::run(&client, why).await,
    }
}
