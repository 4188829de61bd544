//! Owns: asking a running agent for its `/status`.
//! Does not own: what is done where none answers (`cli/status.rs`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::status::{Answer, SCHEMA};

/// An agent answers at once; somebody asks it because something is wrong, and waits.
const DEADLINE: Duration = Duration::from_secs(3);
/// Far more than a thousand clusters need.
const BODY_BYTES_MAX: usize = 16 << 20;

/// What the agent that listens at `listen` says; otherwise why there is no answer of an agent.
pub async fn ask(listen: SocketAddr, token_file: Option<&Path>) -> Result<Answer, String> {
    let asked = tokio::time::timeout(DEADLINE, exchange(reachable(listen), token_file)).await;
    let body = asked.unwrap_or_else(|_| Err(format!("no answer within {DEADLINE:?}")))?;
    let answer: Answer = serde_json::from_slice(&body).map_err(|error| format!("not an agent's answer: {error}"))?;
    match answer.schema {
        SCHEMA => Ok(answer),
        other => Err(format!("an answer of another version: schema {other}")),
    }
}

/// Where one listens everywhere, here too.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

async fn exchange(address: SocketAddr, token_file: Option<&Path>) -> Result<Vec<u8>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut request = Request::get("/status").header(header::HOST, address.to_string());
    if let Some(path) = token_file {
        let token = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim_end()));
    }
    let request = request.body(Body::empty()).map_err(|error| text(&error))?;
    let stream = TcpStream::connect(address).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    let conversation = async {
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        if response.status() != StatusCode::OK {
            return Err(format!("it answers {}", response.status()));
        }
        let body = to_bytes(Body::new(response.into_body()), BODY_BYTES_MAX).await;
        body.map(|body| body.to_vec()).map_err(|error| text(&error))
    };
    let mut conversation = std::pin::pin!(conversation);
    tokio::select! {
        body = conversation.as_mut() => body,
        // The connection may end with the last byte of the answer.
        ended = connection => match ended {
            Ok(()) => conversation.await,
            Err(error) => Err(text(&error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everywhere_is_here() {
        let reachable = |listen: &str| reachable(listen.parse().unwrap()).to_string();
        assert_eq!(reachable("0.0.0.0:1"), "127.0.0.1:1");
        assert_eq!(reachable("[::]:1"), "[::1]:1");
        assert_eq!(reachable("192.0.2.1:1"), "192.0.2.1:1");
    }
}
