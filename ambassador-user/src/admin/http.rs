//! Probes and metrics over HTTP. Reads state, never changes it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tracing::debug;

use crate::proxy::listener::Listener;
use crate::service::Service;

/// A request head larger than this is refused, and one slower than this is cut off.
const MOST_HEAD: usize = 16 * 1024;
const HEAD_TIME: Duration = Duration::from_secs(2);

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers HTTP until the process ends.
pub async fn serve(listener: Listener, service: Arc<Service>) {
    super::serve(listener, |socket| {
        let service = Arc::clone(&service);
        async move {
            let answer = service_fn(|request| {
                let service = Arc::clone(&service);
                async move { Ok::<_, Infallible>(respond(&request, &service).await) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(MOST_HEAD)
                .serve_connection(TokioIo::new(socket), answer)
                .await;
            if let Err(error) = served {
                debug!("admin caller: {error}");
            }
        }
    })
    .await;
}

async fn respond(request: &Request<Incoming>, service: &Service) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal = text(
            StatusCode::METHOD_NOT_ALLOWED,
            "read-only: state is changed over the control socket (ambassador drain, ...)\n".into(),
        );
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let verbose = request.uri().query().is_some_and(|query| {
        query.split('&').any(|parameter| parameter.split('=').next() == Some("verbose"))
    });
    match request.uri().path() {
        // The process is alive if it can say so; whether upstreams are is not its liveness.
        "/livez" => probe(None, verbose, service),
        // Once bound, it has started, and it stays started while it drains.
        "/startupz" => probe(None, verbose, service),
        "/readyz" | "/healthz" => probe(service.not_ready(), verbose, service),
        "/metrics" => metrics(service).await,
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /startupz /readyz /livez /healthz (?verbose) and /metrics\n".into(),
        ),
    }
}

fn probe(not_ready: Option<String>, verbose: bool, service: &Service) -> Response<Full<Bytes>> {
    let (status, mut body) = match not_ready {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
    };
    if verbose {
        for route in service.routes().iter() {
            body += &format!(
                "route {}: {} connections, tier {}, upstream {} ({})\n",
                route.name,
                route.active(),
                route.choice().tier,
                route.upstream.name,
                route.upstream.endpoints().len(),
            );
        }
    }
    text(status, body)
}

async fn metrics(service: &Service) -> Response<Full<Bytes>> {
    service.settle().await;
    match service.metrics.render() {
        Ok(body) => response(StatusCode::OK, OPEN_METRICS, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, TEXT, body)
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
