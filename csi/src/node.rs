//! The Node service.
pub struct NodeConfig;
pub async fn serve_node() {}
