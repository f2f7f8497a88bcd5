//! What can go wrong in a CSI call.

use std::fmt;
use std::io;
use std::path::PathBuf;

use api::ErrorKind;

use crate::ParameterError;

/// One field in which a thing that exists is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub field: String,
    pub wanted: String,
    pub has: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_nothing = |text: &str| if text.is_empty() { "nothing".to_owned() } else { text.to_owned() };
        write!(f, "{}: wanted {}, has {}", self.field, or_nothing(&self.wanted), or_nothing(&self.has))
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}

/// A failed CSI call. The sentence is for the user.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    #[error("`{field}` is missing from the request")]
    Missing { field: &'static str },
    #[error("`{field}` is `{value}`: it must be {right}")]
    Field { field: &'static str, value: String, right: &'static str },
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    #[error("this volume capability cannot be served: {reason}")]
    Capability { reason: String },
    #[error("{what} is not offered; {instead}")]
    NotOffered { what: &'static str, instead: &'static str },
    #[error("{reason}")]
    Size { reason: String },
    #[error("volume `{volume_id}` does not exist")]
    NoVolume { volume_id: String },
    #[error("node `{node_id}` does not exist; `backing-image-csi get nodes` lists those that do")]
    NoNode { node_id: String },
    #[error("{reason}")]
    NoImage { reason: String },
    #[error(
        "image `{image}` does not exist, and a volume cannot make one of type `{source_type}`; create the image first, then the volume"
    )]
    ImageByHand { image: String, source_type: &'static str },
    #[error("{what}")]
    Refused { what: String, source: api::validation::FieldErrors },
    #[error("volume `{volume_id}` exists already with other parameters: {}; use another name, or delete it first", list(.differences))]
    VolumeDiffers { volume_id: String, differences: Vec<Difference> },
    #[error("image `{image}` exists already and is not what the parameters describe: {}; leave those parameters out, or use another image name", list(.differences))]
    ImageDiffers { image: String, differences: Vec<Difference> },
    #[error("image `{image}` is being deleted; wait until it is gone, or use another name")]
    ImageDeleting { image: String },
    #[error(
        "whether image `{image}` has the wanted checksum is not known yet ({progress}); repeat the call when it is ready"
    )]
    ImageUnknown { image: String, progress: String },
    #[error("volume `{volume_id}` is being deleted; wait until it is gone, or use another name")]
    VolumeDeleting { volume_id: String },
    #[error("another call is working on volume `{volume_id}`; repeat this one when it has ended")]
    InFlight { volume_id: String },
    #[error("volume `{volume_id}` is attached to node `{node}`; {hint}")]
    AttachedElsewhere { volume_id: String, node: String, hint: &'static str },
    #[error("volume `{volume_id}` {reason}")]
    NotUsable { volume_id: String, reason: String },
    #[error(
        "volume `{volume_id}` cannot grow: {reason}; make room there, or raise the setting `storage-over-provisioning-percentage`"
    )]
    NoRoom { volume_id: String, reason: String },
    #[error("volume `{volume_id}` can never be attached: {reason}")]
    TooSmall { volume_id: String, reason: String },
    #[error("volume `{volume_id}` {progress}")]
    StillWaiting { volume_id: String, progress: String },
    #[error("`{token}` is not a token of ours; begin again without `starting_token`")]
    Token { token: String },
    #[error("{what} was changed by others again and again; repeat the call")]
    Contended { what: String },
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error("nothing of volume `{volume_id}` is at `{}`", .path.display())]
    NotThere { volume_id: String, path: PathBuf },
    #[error("`{}` is used for something else: {reason}", .path.display())]
    PathTaken { path: PathBuf, reason: String },
    #[error("the content of volume `{volume_id}` is left as it is: {reason}")]
    Content { volume_id: String, reason: String },
    #[error(transparent)]
    Dataplane(#[from] dataplane::DataplaneError),
    #[error("cannot {what} `{}`", .path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot listen on `{}`", .socket.display())]
    Listen { socket: PathBuf, source: io::Error },
    #[error("serving on `{}` ended", .socket.display())]
    Serve { socket: PathBuf, source: tonic::transport::Error },
}

impl CsiError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CsiError::Missing { .. }
            | CsiError::Field { .. }
            | CsiError::Parameter(_)
            | CsiError::Capability { .. }
            | CsiError::NotOffered { .. }
            | CsiError::ImageByHand { .. }
            | CsiError::Refused { .. } => ErrorKind::Invalid,
            CsiError::Size { .. } | CsiError::TooSmall { .. } => ErrorKind::OutOfRange,
            CsiError::NoVolume { .. }
            | CsiError::NoNode { .. }
            | CsiError::NoImage { .. }
            | CsiError::NotThere { .. } => ErrorKind::NotFound,
            CsiError::VolumeDiffers { .. } | CsiError::ImageDiffers { .. } | CsiError::PathTaken { .. } => {
                ErrorKind::Incompatible
            }
            CsiError::ImageDeleting { .. }
            | CsiError::VolumeDeleting { .. }
            | CsiError::AttachedElsewhere { .. }
            | CsiError::NotUsable { .. }
            | CsiError::Content { .. } => ErrorKind::NotReady,
            CsiError::NoRoom { .. } => ErrorKind::Exhausted,
            // A token that does not begin a page is ABORTED by the specification.
            CsiError::Token { .. }
            | CsiError::ImageUnknown { .. }
            | CsiError::InFlight { .. }
            | CsiError::StillWaiting { .. }
            | CsiError::Contended { .. } => ErrorKind::Pending,
            CsiError::Store(error) => error.kind(),
            // A file that is missing here is no volume that is missing, and another node is no remedy for a full disk of this one.
            CsiError::Dataplane(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::Exhausted => ErrorKind::Internal,
                kind => kind,
            },
            CsiError::Path { .. } | CsiError::Listen { .. } | CsiError::Serve { .. } => ErrorKind::Internal,
        }
    }
}
