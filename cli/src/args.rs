//! The command line: what it takes and which part answers.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::client::Client;
use crate::failure::exit_code;
use crate::kubernetes::{controller, instance, node, supervisor};
use crate::{apply, dataplane_roles, delete, get, image, roles, serve, standalone, volume, why};

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
    Standalone(standalone::Standalone),
    Controller(Box<controller::Controller>),
    Node(node::Node),
    Instance(instance::Instance),
    #[command(hide = true)]
    Supervise(supervisor::Supervise),
    BackingImageManager(roles::ManagerFace),
    DataSource(roles::DataSource),
    #[command(hide = true)]
    Sha512(roles::Sha512),
    #[command(hide = true)]
    Replica(dataplane_roles::Replica),
    #[command(hide = true)]
    Engine(dataplane_roles::Engine),
    #[command(hide = true)]
    EngineHolder(dataplane_roles::EngineHolder),
    #[command(hide = true)]
    Serve(serve::Serve),
}

/// The program as Longhorn calls it.
#[derive(Parser, Debug)]
#[command(name = "backing-image-manager", version)]
struct ManagerProgram {
    #[command(flatten)]
    face: roles::ManagerFace,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    let result = if Path::new(&called).file_name().is_some_and(|name| name == "backing-image-manager") {
        run(Command::BackingImageManager(ManagerProgram::parse().face), None)
    } else {
        let Cli { server: Server { server }, command } = Cli::parse();
        match command {
            Command::Engine(engine) => dataplane_roles::engine(engine),
            Command::EngineHolder(holder) => dataplane_roles::engine_holder(holder),
            command => run(command, Some(&server)),
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(command: Command, server: Option<&str>) -> anyhow::Result<()> {
    let mut runtime = match &command {
        // It answers a few questions, and there is one for each replica: a thread for each processor would be wasted.
        Command::Replica(_) | Command::Supervise(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(dispatch(command, server))
}

async fn dispatch(command: Command, server: Option<&str>) -> anyhow::Result<()> {
    let client = || Client::new(server.unwrap_or_default());
    match command {
        Command::Apply(apply) => apply::run(&client()?, apply).await,
        Command::Get(get) => get::run(&client()?, get).await,
        Command::Delete(delete) => delete::run(&client()?, delete).await,
        Command::Image(image) => image::run(&client()?, image, &system_namespace()).await,
        Command::Volume(command) => volume::run(&client()?, command, &system_namespace()).await,
        Command::Why(why) => why::run(&client()?, why).await,
        Command::Standalone(standalone) => standalone::run(standalone).await,
        Command::Controller(controller) => controller::run(*controller).await,
        Command::Node(node) => node::run(node).await,
        Command::Instance(_) if supervisor::is_wanted() => supervisor::run_self().await,
        Command::Instance(instance) => instance::run(instance).await,
        Command::Supervise(supervise) => supervisor::run(supervise).await,
        Command::BackingImageManager(face) => roles::backing_image_manager(face).await,
        Command::DataSource(source) => roles::data_source(source).await,
        Command::Sha512(file) => roles::sha512(&file),
        Command::Replica(replica) => dataplane_roles::replica(replica).await,
        // These two have no use for a runtime and are run by the caller.
        Command::Engine(engine) => dataplane_roles::engine(engine),
        Command::EngineHolder(holder) => dataplane_roles::engine_holder(holder),
        Command::Serve(serve) => serve::run(serve).await,
    }
}

/// The namespace of our own objects.
fn system_namespace() -> String {
    std::env::var("BACKING_IMAGE_CSI_SYSTEM_NAMESPACE").unwrap_or_else(|_| api::names::DEFAULT_NAMESPACE.to_owned())
}

#[cfg(test)]
mod tests;
