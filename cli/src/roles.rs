//! Roles that run as processes of their own: flags in, the role's `run` until a signal.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use agent::download::Patience;
use agent::{client, data_source, manager};
use anyhow::Context;
use api::ids::{DiskId, ImageName, ImageUuid, Sha512Digest};
use api::image::SourceType;
use api::names::{DISK_MOUNT, SOURCE_PARAMETERS};
use api::source_address::AllowedSources;
use api::{ErrorKind, Secrets, bandwidth};
use clap::{Args, Subcommand};
use runtime::transport::Security;

use crate::failure::{Failure, failed};

/// The manager of the image files of one disk, and its client (also as a program called `backing-image-manager`).
#[derive(Args, Debug)]
pub struct ManagerFace {
    /// Log more.
    #[arg(long, global = true)]
    debug: bool,
    /// Address of the manager that the client talks to.
    #[arg(long, global = true, default_value = client::DEFAULT_URL)]
    url: String,
    #[command(subcommand)]
    command: ManagerCommand,
}

#[derive(Subcommand, Debug)]
enum ManagerCommand {
    /// Runs the manager of one disk.
    Daemon {
        /// Where to serve gRPC; without a host part the address in POD_IP, else every address.
        #[arg(long, default_value = ":8000", value_parser = listen)]
        listen: SocketAddr,
        /// Where to serve chunks; always the port after --listen.
        #[arg(long, default_value = ":8001")]
        sync_listen: String,
        /// The UUID that the disk must have.
        #[arg(long)]
        disk_uuid: Option<DiskId>,
        /// The root of the disk.
        #[arg(long, default_value = DISK_MOUNT)]
        disk_path: PathBuf,
        /// Accepted as Longhorn's; transfers need no ports of their own here.
        #[arg(long, default_value = "30001-31000")]
        port_range: String,
    },
    /// Runs the data source of one image.
    DataSource(DataSource),
    /// Asks a manager about its image files.
    #[command(subcommand)]
    BackingImage(FileCommand),
}

/// Asks a manager about its image files; answers are Longhorn's JSON.
#[derive(Subcommand, Debug)]
enum FileCommand {
    /// All files.
    List,
    /// One file.
    Get {
        #[arg(long)]
        name: String,
        #[arg(long)]
        uuid: String,
    },
    /// Removes a file.
    Delete {
        #[arg(long)]
        name: String,
        #[arg(long)]
        uuid: String,
    },
}

/// The process that makes the first file of an image.
#[derive(Args, Debug)]
pub struct DataSource {
    /// Where to serve HTTP; without a host part the address in POD_IP, else every address.
    #[arg(long, default_value = ":8000", value_parser = listen)]
    listen: SocketAddr,
    /// Accepted as Longhorn's; nothing is served there.
    #[arg(long, default_value = ":8001")]
    sync_listen: String,
    /// The image's name.
    #[arg(long)]
    name: ImageName,
    /// The image's UUID.
    #[arg(long)]
    uuid: ImageUuid,
    /// download, upload, export-from-volume, restore or clone; only download is offered.
    #[arg(long, value_parser = source_type)]
    source_type: SourceType,
    /// A source parameter, KEY=VALUE; may be given several times.
    #[arg(long, value_parser = pair)]
    parameters: Vec<(String, String)>,
    /// More of them, as a JSON object; meant for the environment, since arguments can be read by others.
    #[arg(long, env = SOURCE_PARAMETERS, hide_env_values = true, default_value = "{}", value_parser = object)]
    source_parameters: Secrets,
    /// SHA-512 that the file must have.
    #[arg(long, default_value = "", value_parser = checksum)]
    checksum: Option<Checksum>,
    /// Addresses and networks of this machine, of its links and of the cloud that a download may come from, with commas between.
    #[arg(long, default_value = "")]
    allowed_source_addresses: AllowedSources,
    /// Bytes a second that are downloaded at most, until another limit is told; 0: no limit.
    #[arg(long, default_value = "0", value_parser = bandwidth_limit)]
    bandwidth_limit: u64,
    /// A credential, KEY=VALUE; none is used for downloads.
    #[arg(long, value_parser = pair)]
    credential: Vec<(String, String)>,
    /// The root of the disk.
    #[arg(long, default_value = DISK_MOUNT)]
    disk_path: PathBuf,
}

/// A checksum flag; empty means none, as Longhorn writes it.
#[derive(Clone, Debug)]
struct Checksum(Option<Sha512Digest>);

/// Reads a limit of bandwidth.
pub(crate) fn bandwidth_limit(text: &str) -> Result<u64, String> {
    bandwidth::parse(text).ok_or_else(|| format!("give {}", bandwidth::RULE))
}

fn checksum(text: &str) -> Result<Checksum, String> {
    if text.is_empty() {
        return Ok(Checksum(None));
    }
    text.parse().map(|digest| Checksum(Some(digest))).map_err(|e: api::ids::InvalidId| e.to_string())
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(format!("`{text}` is not of the form KEY=VALUE")),
    }
}

/// A JSON object of texts, whose values are not for messages.
fn object(text: &str) -> Result<Secrets, String> {
    serde_json::from_str(text).map(Secrets).map_err(|_| "it is not a JSON object of texts".to_owned())
}

fn source_type(text: &str) -> Result<SourceType, String> {
    let value = serde_json::Value::String(text.to_owned());
    serde_json::from_value(value).map_err(|_| {
        format!("`{text}` is not a source type; there are download, upload, export-from-volume, restore, clone")
    })
}

/// An address to listen on: `10.0.0.1:8000`, or `:8000` for the address of the pod.
pub fn listen(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| format!("`{text}` has no port number"))?;
        let own = std::env::var("POD_IP").ok().and_then(|ip| ip.parse().ok());
        return Ok(SocketAddr::new(own.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port));
    }
    text.parse().map_err(|_| format!("`{text}` is not an address to listen on; write for example 127.0.0.1:8000"))
}

/// Prints the SHA-512 of a file as an agent computes it, to be measured.
#[derive(Args, Debug)]
pub struct Sha512 {
    file: PathBuf,
}

/// Runs `sha512 FILE`.
pub fn sha512(Sha512 { file }: &Sha512) -> anyhow::Result<()> {
    println!("{}  {}", agent::sha512::of_file(file).map_err(agent_failure)?, file.display());
    Ok(())
}

/// How processes of ours listen and connect. The one place that decides it: mutual TLS comes with certificates for every role.
/// Replicas and engines are told by the instance role that started them, in their configuration.
pub fn security() -> Security {
    Security::default()
}

/// Starts logging for a role.
pub fn start_logs(debug: bool) {
    let filter = if debug { "info,backing_image=debug" } else { "info" };
    let json = std::env::var("BACKING_IMAGE_CSI_LOG_FORMAT").is_ok_and(|format| format.eq_ignore_ascii_case("json"));
    runtime::log::init(if json { runtime::log::Format::Json } else { runtime::log::Format::Text }, filter);
}

/// Runs `backing-image-manager …`.
pub async fn backing_image_manager(ManagerFace { debug, url, command }: ManagerFace) -> anyhow::Result<()> {
    match command {
        ManagerCommand::Daemon { listen, sync_listen: _, disk_uuid, disk_path, port_range: _ } => {
            start_logs(debug);
            let config = manager::Config { disk_uuid, security: security(), ..manager::Config::new(listen, disk_path) };
            let shutdown = runtime::shutdown::on_signal().context("cannot listen for signals")?;
            manager::run(config, shutdown).await.map_err(agent_failure)
        }
        ManagerCommand::DataSource(source) => data_source(source).await,
        ManagerCommand::BackingImage(command) => file(&url, command).await,
    }
}

async fn file(url: &str, command: FileCommand) -> anyhow::Result<()> {
    match command {
        FileCommand::List => {
            println!("{}", client::to_json(&client::list(url, &security()).await.map_err(agent_failure)?))
        }
        FileCommand::Get { name, uuid } => {
            println!("{}", client::to_json(&client::get(url, &name, &uuid, &security()).await.map_err(agent_failure)?));
        }
        FileCommand::Delete { name, uuid } => {
            client::delete(url, &name, &uuid, &security()).await.map_err(agent_failure)?
        }
    }
    Ok(())
}

/// Runs `data-source …`.
pub async fn data_source(source: DataSource) -> anyhow::Result<()> {
    let DataSource {
        listen,
        sync_listen: _,
        name,
        uuid,
        source_type,
        parameters,
        source_parameters,
        checksum,
        allowed_source_addresses,
        bandwidth_limit,
        credential,
        disk_path,
    } = source;
    start_logs(false);
    if !credential.is_empty() {
        return failed(ErrorKind::Unsupported, "credentials are for source types that are not offered yet");
    }
    let config = data_source::Config {
        listen,
        disk_path,
        name,
        uuid,
        source_type,
        parameters: source_parameters.0.into_iter().chain(parameters).collect(),
        checksum: checksum.and_then(|c| c.0),
        allowed_sources: allowed_source_addresses,
        bandwidth_limit,
        patience: Patience::default(),
        security: security(),
    };
    let shutdown = runtime::shutdown::on_signal().context("cannot listen for signals")?;
    data_source::run(config, shutdown).await.map_err(agent_failure)
}

fn agent_failure(error: agent::AgentError) -> anyhow::Error {
    let kind = error.kind();
    let message = error.chain();
    anyhow::Error::from(Failure::new(kind, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_flags_as_longhorn_writes_them() {
        assert_eq!(listen("127.0.0.1:8000").unwrap().port(), 8000);
        assert_eq!(listen(":8000").unwrap().port(), 8000);
        assert!(listen("8000").is_err());
        assert_eq!(pair("url=http://x/?a=b").unwrap(), ("url".into(), "http://x/?a=b".into()));
        assert!(checksum("").unwrap().0.is_none());
        assert!(checksum("abc").is_err());
        assert_eq!(source_type("export-from-volume").unwrap(), SourceType::ExportFromVolume);
    }
}
