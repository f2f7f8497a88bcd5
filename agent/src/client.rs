//! The `backing-image-manager backing-image …` commands: a manager's answers, printed as Longhorn's own program prints them.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::bimrpc::backing_image_manager_service_client::BackingImageManagerServiceClient;
use proto::bimrpc::{BackingImageResponse, DeleteRequest, GetRequest};
use runtime::transport::Security;
use serde::Serialize;
use tonic::transport::{Channel, Endpoint};

use crate::error::{AgentError, chain};

/// Where a manager listens, seen from inside its pod.
pub const DEFAULT_URL: &str = "localhost:8000";

/// Longhorn's limit for one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// One copy in Longhorn's JSON form, its keys in Longhorn's order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BackingImage {
    pub name: String,
    pub uuid: String,
    pub size: i64,
    pub virtual_size: i64,
    pub real_size: i64,
    pub expected_checksum: String,
    pub status: Status,
}

/// The state of a copy in Longhorn's JSON form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub state: String,
    pub current_checksum: String,
    pub sending_reference: i32,
    pub error_msg: String,
    pub sender_manager_address: String,
    pub progress: i32,
}

impl From<BackingImageResponse> for BackingImage {
    fn from(response: BackingImageResponse) -> Self {
        let (spec, status) = (response.spec.unwrap_or_default(), response.status.unwrap_or_default());
        BackingImage {
            name: spec.name,
            uuid: spec.uuid,
            size: spec.size,
            virtual_size: spec.virtual_size,
            real_size: spec.real_size,
            expected_checksum: spec.checksum,
            status: Status {
                state: status.state,
                current_checksum: status.checksum,
                sending_reference: status.sending_reference,
                error_msg: status.error_msg,
                sender_manager_address: status.sender_manager_address,
                progress: status.progress,
            },
        }
    }
}

/// All copies of a manager, by name.
pub async fn list(url: &str, security: &Security) -> Result<BTreeMap<String, BackingImage>, AgentError> {
    let response = connect(url, security).await?.list(()).await.map_err(|e| refused(url, e))?;
    Ok(response.into_inner().backing_images.into_iter().map(|(name, copy)| (name, copy.into())).collect())
}

/// One copy.
///
/// # Errors
/// `NotFound` when the manager does not know it.
pub async fn get(url: &str, name: &str, uuid: &str, security: &Security) -> Result<BackingImage, AgentError> {
    let request = GetRequest { name: name.into(), uuid: uuid.into() };
    let response = connect(url, security).await?.get(request).await.map_err(|e| refused(url, e))?;
    Ok(response.into_inner().into())
}

/// Removes a copy; fine when there is none.
pub async fn delete(url: &str, name: &str, uuid: &str, security: &Security) -> Result<(), AgentError> {
    let request = DeleteRequest { name: name.into(), uuid: uuid.into() };
    connect(url, security).await?.delete(request).await.map_err(|e| refused(url, e))?;
    Ok(())
}

/// The text that Longhorn's program prints for a value: tabs, and `<`, `>`, `&` escaped, as Go does; no newline at the end.
pub fn to_json(value: &impl Serialize) -> String {
    let mut out = vec![];
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    value.serialize(&mut serializer).expect("strings and numbers serialize");
    let text = String::from_utf8(out).expect("JSON is UTF-8");
    // Outside of strings JSON has none of these.
    text.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

async fn connect(url: &str, security: &Security) -> Result<BackingImageManagerServiceClient<Channel>, AgentError> {
    let endpoint = Endpoint::from_shared(format!("http://{url}")).map_err(|e| AgentError::Invalid {
        message: format!("`{url}` is not the address of a manager, give `host:8000`: {}", chain(&e)),
    })?;
    let endpoint = endpoint.connect_timeout(CALL_TIMEOUT).timeout(CALL_TIMEOUT);
    let channel = security.connect(&endpoint).await.map_err(|e| AgentError::Unavailable {
        message: format!("cannot connect to the manager at `{url}`: {}", chain(&e)),
    })?;
    Ok(BackingImageManagerServiceClient::new(channel))
}

fn refused(url: &str, status: tonic::Status) -> AgentError {
    use tonic::Code;
    let message = format!("the manager at `{url}` answered: {}", status.message());
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => AgentError::Invalid { message },
        Code::NotFound => AgentError::NotFound { message },
        Code::FailedPrecondition | Code::ResourceExhausted | Code::Aborted => AgentError::NotReady { message },
        Code::Unimplemented => AgentError::Unsupported { message },
        _ => AgentError::Unavailable { message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_longhorns_json() {
        let copy = BackingImage {
            name: "parrot".into(),
            uuid: "0a1b2c3d".into(),
            size: 33554432,
            virtual_size: 33554432,
            real_size: 4096,
            expected_checksum: "e".into(),
            status: Status {
                state: "failed".into(),
                current_checksum: "c".into(),
                error_msg: "a < b".into(),
                ..Default::default()
            },
        };
        let list = BTreeMap::from([("parrot".to_owned(), copy)]);
        expect_test::expect![[r#"
            {
            	"parrot": {
            		"name": "parrot",
            		"uuid": "0a1b2c3d",
            		"size": 33554432,
            		"virtualSize": 33554432,
            		"realSize": 4096,
            		"expectedChecksum": "e",
            		"status": {
            			"state": "failed",
            			"currentChecksum": "c",
            			"sendingReference": 0,
            			"errorMsg": "a \u003c b",
            			"senderManagerAddress": "",
            			"progress": 0
            		}
            	}
            }"#]]
        .assert_eq(&to_json(&list));
        assert_eq!(to_json(&BTreeMap::<String, BackingImage>::new()), "{}");
    }
}
