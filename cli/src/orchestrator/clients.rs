//! CSI clients over the unix sockets of the driver.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ::api::ErrorKind;
use hyper_util::rt::TokioIo;
use proto::csi::controller_client::ControllerClient;
use proto::csi::node_client::NodeClient;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tower::service_fn;

use crate::failure::Failure;

/// How long one call may take; the sidecars of Longhorn give 1m50s.
const CALL_TIMEOUT: Duration = Duration::from_secs(110);
/// How long one call to attach may take: shorter, because its answer carries progress.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(15);

/// Where the sockets are.
pub struct Sockets {
    folder: PathBuf,
}

impl Sockets {
    pub fn new(folder: PathBuf) -> Sockets {
        Sockets { folder }
    }

    /// The controller service.
    pub async fn controller(&self) -> Result<ControllerClient<Channel>, Failure> {
        Ok(ControllerClient::new(connect(&self.folder.join("controller.sock")).await?))
    }

    /// The node service of a node.
    pub async fn node(&self, node: &str) -> Result<NodeClient<Channel>, Failure> {
        let path = self.folder.join(format!("{node}.sock"));
        if node.contains('/') || !path.exists() {
            return Err(Failure::new(
                ErrorKind::NotFound,
                format!("node `{node}` does not exist; `get nodes` shows them"),
            ));
        }
        Ok(NodeClient::new(connect(&path).await?))
    }
}

/// A channel over a unix socket.
pub async fn connect(path: &Path) -> Result<Channel, Failure> {
    let path = path.to_owned();
    let unavailable = |e: String| Failure::new(ErrorKind::Unavailable, format!("the CSI driver does not answer: {e}"));
    // The address is not used; the connector knows where to go.
    let endpoint = Endpoint::from_static("http://csi.invalid");
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { runtime::socket::connect(&path).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await.map_err(|e| unavailable(e.to_string()))
}

/// A request with the usual deadline.
pub fn request<T>(message: T) -> Request<T> {
    with_timeout(message, CALL_TIMEOUT)
}

/// A request with the deadline of an attachment.
pub fn attach_request<T>(message: T) -> Request<T> {
    with_timeout(message, ATTACH_TIMEOUT)
}

fn with_timeout<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// What a CSI error means for the user.
pub fn failure(status: Status) -> Failure {
    let kind = match status.code() {
        Code::InvalidArgument => ErrorKind::Invalid,
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists => ErrorKind::Incompatible,
        Code::FailedPrecondition => ErrorKind::NotReady,
        Code::OutOfRange => ErrorKind::OutOfRange,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::Aborted => ErrorKind::Pending,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ErrorKind::Unavailable,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::DataLoss => ErrorKind::Corrupt,
        _ => ErrorKind::Internal,
    };
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    Failure::new(kind, message)
}

/// Whether the same call may succeed a little later.
pub fn is_transient(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Pending | ErrorKind::Unavailable | ErrorKind::Exhausted)
}
