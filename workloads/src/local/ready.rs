//! Whether a workload is ready: all of its ports accept connections.

use std::net::{IpAddr, SocketAddr};

use runtime::backoff::Backoff;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::limits;

/// Returns when every port accepts a connection. Meant to be raced against the end of the process and a deadline.
pub async fn wait_until_ready(ip: IpAddr, ports: &[u16]) {
    for port in ports {
        let backoff = Backoff { initial: limits::READY_WAIT_FIRST, max: limits::READY_WAIT_MAX };
        let mut failures = 0;
        while !accepts(SocketAddr::new(ip, *port)).await {
            failures += 1;
            sleep(backoff.delay(failures)).await;
        }
    }
}

/// Whether every port accepts a connection now.
pub async fn is_ready(ip: IpAddr, ports: &[u16]) -> bool {
    for port in ports {
        if !accepts(SocketAddr::new(ip, *port)).await {
            return false;
        }
    }
    true
}

/// Whether something listens there.
async fn accepts(address: SocketAddr) -> bool {
    matches!(timeout(limits::CONNECT_TIMEOUT, TcpStream::connect(address)).await, Ok(Ok(_)))
}
