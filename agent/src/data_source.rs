//! Role `data-source`: makes the first file of one image, then offers it for transfer.
//!
//! It works in `<disk>/tmp/`, reports over HTTP on port 8000 (LF 5.2), and waits until the manager of the disk has taken the
//! file over. Started again after a kill it offers a finished file at once, and goes on with an unfinished one where the last
//! checkpoint was, when the server proves that its file is still the same.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use api::ids::{ImageName, ImageUuid, Sha512Digest};
use api::image::{CopyState, SourceType};
use api::source_address::AllowedSources;
use runtime::transport::{Protocol, Security};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::bandwidth::Limit;
use crate::config_file::{FileConfig, Format};
use crate::download::{Download, Event, Patience, download};
use crate::durable;
use crate::error::{AgentError, blocking};
use crate::layout::{Disk, FileSet, ImageKey};
use crate::limits::DRAIN_TIMEOUT;
use crate::manifest::Manifest;
use crate::seal::seal;
use crate::source_url::SourceUrl;

mod http;
mod status;

pub use status::FileStatus;

/// Key of the source parameter that holds the address.
pub const PARAMETER_URL: &str = "url";
/// Key of the source parameter that asks for padding to whole sectors: `true` or `false`.
pub const PARAMETER_PAD: &str = "padToSector";

/// What a data source works on.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to serve HTTP: its own address, port 8000.
    pub listen: SocketAddr,
    /// The root of the disk (`/data` in a container).
    pub disk_path: PathBuf,
    /// The image's name.
    pub name: ImageName,
    /// The image's uuid.
    pub uuid: ImageUuid,
    /// Where the file comes from; only `download` is offered.
    pub source_type: SourceType,
    /// Longhorn's source parameters (LF 1.5): `url`, and our `padToSector`.
    pub parameters: BTreeMap<String, String>,
    /// SHA-512 that the file must have.
    pub checksum: Option<Sha512Digest>,
    /// The setting `backing-image-allowed-source-addresses`.
    pub allowed_sources: AllowedSources,
    /// Bytes a second that are downloaded at most, until another limit is told over HTTP; 0: no limit.
    pub bandwidth_limit: u64,
    /// Pauses and limits; [`Patience::default`] outside of tests.
    pub patience: Patience,
    /// How it listens.
    pub security: Security,
}

/// Works until `shutdown`. A failed preparation does not end it: the reason stays to be read over HTTP.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), AgentError> {
    let disk = Disk::new(&config.disk_path);
    let own = disk.clone();
    let disk_uuid = blocking(move || own.read_uuid()).await?;
    let key = ImageKey { name: config.name.clone(), uuid: config.uuid.clone() };
    let listener = config
        .security
        .listen(config.listen, Protocol::Http1)
        .await
        .map_err(|source| AgentError::Listen { address: config.listen, source })?;
    let files = disk.source(&key);
    let (status, _) = watch::channel(FileStatus::new(&config, &disk_uuid, &files.file));
    let status = Arc::new(status);
    tracing::info!(image = %key, disk = %disk_uuid, source = config.source_type.as_str(), "data source started");

    let limit = Arc::new(Limit::new(config.bandwidth_limit));
    let server = http::serve(listener, status.clone(), limit.clone(), shutdown.clone());
    let span = tracing::info_span!("data_source", image = %key, disk = %disk_uuid);
    let work = async {
        match prepare(&config, &files, &status, limit, &shutdown).await {
            Ok(()) | Err(AgentError::Cancelled) => {}
            Err(error) => {
                tracing::error!(error = error.chain(), "preparation failed");
                status.send_modify(|s| s.fail(&error));
            }
        }
    }
    .instrument(span);
    // The server decides about the end; the work may still remove what it has.
    let ended = async {
        let served = server.await;
        shutdown.cancel();
        served
    };
    let served = tokio::select! {
        (served, ()) = async { tokio::join!(ended, work) } => served,
        () = async { shutdown.cancelled().await; tokio::time::sleep(DRAIN_TIMEOUT).await } => Ok(()),
    };
    served.map_err(|e| AgentError::Serve { what: "data source", source: e.into() })
}

async fn prepare(
    config: &Config,
    files: &FileSet,
    status: &Arc<watch::Sender<FileStatus>>,
    limit: Arc<Limit>,
    shutdown: &CancellationToken,
) -> Result<(), AgentError> {
    if config.source_type != SourceType::Download {
        return Err(AgentError::Unsupported {
            message: format!(
                "the source type `{}` is not supported yet: use `download` with the source parameter `url`",
                config.source_type.as_str()
            ),
        });
    }
    let what = what_to_download(config, limit)?;
    if let Some((found, state)) = adopt(config, files).await? {
        tracing::info!(file = found.name, state = state.as_str(), "finished file found");
        status.send_modify(|s| {
            s.finish(&found);
            s.state = state;
        });
        return Ok(());
    }
    status.send_modify(|s| s.state = CopyState::Starting);
    let reporter = status.clone();
    let report = move |event: Event| reporter.send_modify(|s| s.apply(event));
    let ingested = download(&what, files, &config.patience, &report, shutdown).await?;
    let manifest = Manifest {
        uuid: config.uuid.clone(),
        sha512: ingested.sha512,
        format: ingested.format,
        size_bytes: ingested.size_bytes,
        virtual_size_bytes: ingested.virtual_size_bytes,
        chunks: ingested.chunks,
    };
    let (file, files) = (ingested.file, files.clone());
    let expected = config.checksum.as_ref().map(ToString::to_string).unwrap_or_default();
    let sealed = blocking(move || {
        let sealed = seal(&file, &files.partial, &files, &manifest, &expected).inspect_err(|_| {
            // Nothing of a failed preparation stays; the error of the seal is the one to report.
            let _ = files.remove();
        })?;
        durable::remove_file(&files.unfinished)?;
        Ok(sealed)
    })
    .await?;
    tracing::info!(file = sealed.name, sha512 = sealed.current_checksum, "file ready for transfer");
    status.send_modify(|s| s.finish(&sealed));
    Ok(())
}

fn what_to_download(config: &Config, limit: Arc<Limit>) -> Result<Download, AgentError> {
    let url = SourceUrl::parse(config.parameters.get(PARAMETER_URL).map_or("", String::as_str))?;
    let pad_to_sector = match config.parameters.get(PARAMETER_PAD).map_or("false", String::as_str) {
        "true" => true,
        "false" => false,
        other => {
            return Err(AgentError::Invalid {
                message: format!("the source parameter `{PARAMETER_PAD}` is `{other}`: give `true` or `false`"),
            });
        }
    };
    let (expected, allowed) = (config.checksum.clone(), config.allowed_sources.clone());
    Ok(Download { url, expected, pad_to_sector, allowed, limit })
}

/// The file that an earlier life of this data source finished: still here, or taken over already by the manager.
/// Anything else of it is removed, but the part of a download that was not finished.
async fn adopt(config: &Config, files: &FileSet) -> Result<Option<(FileConfig, CopyState)>, AgentError> {
    let key = ImageKey { name: config.name.clone(), uuid: config.uuid.clone() };
    let (config, files, copy) = (config.clone(), files.clone(), Disk::new(&config.disk_path).copy(&key));
    blocking(move || {
        if finished(&config, &files).is_some() {
            claim(&files)?;
            // Looked at again: until then it could be removed as what nobody works on.
            if let Some(found) = finished(&config, &files) {
                return Ok(Some((found, CopyState::ReadyForTransfer)));
            }
        }
        let taken_over = finished(&config, &copy);
        for path in [&files.file, &files.config, &files.manifest] {
            durable::remove_file(path)?;
        }
        if taken_over.is_some() {
            files.remove()?;
        }
        Ok(taken_over.map(|found| (found, CopyState::Ready)))
    })
    .await
}

/// Changes the mark of a finished file without writing it: who wants it removed has decided on what it was before.
fn claim(files: &FileSet) -> Result<(), AgentError> {
    let touched = File::open(&files.config).and_then(|file| file.set_modified(SystemTime::now()));
    match touched {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        touched => touched.map_err(AgentError::io("touch", &files.config)),
    }
}

fn finished(config: &Config, files: &FileSet) -> Option<FileConfig> {
    FileConfig::read(&files.config).filter(|found| {
        let whole = files.file.metadata().is_ok_and(|metadata| found.matches(&metadata));
        let described = matches!(Manifest::read(&files.manifest), Ok(Some(manifest))
            if manifest.sha512.as_str() == found.current_checksum && manifest.size_bytes == found.size);
        let wanted = config.checksum.as_ref().is_none_or(|wanted| wanted.as_str() == found.current_checksum);
        let format_known = Format::from_name(&found.format).is_some();
        whole && described && wanted && format_known && found.uuid == config.uuid.as_str()
    })
}
