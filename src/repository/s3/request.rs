//! Owns: sending one request: on the current client, once more on a newer one where that may help; its refusal.
//! Does not own: attempts and deadlines (`client.rs`), what an answer means (`answer.rs`).

use std::error::Error;
use std::future::Future;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::answer::{Action, Answer, Refusal, no_answer, no_credentials, refusal};
use super::client::Shared;
use crate::repository::{Key, StoreError};

impl Shared {
    /// Sends what `request` makes of a client. It is made again when the first client's credentials were refused
    /// and newer ones are found.
    pub(super) async fn send<T, E, F>(&self, action: Action, request: impl Fn(Client) -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        let connection = self.connection().await?;
        let refused = match request(connection.client.clone()).await {
            Ok(output) => return Ok(output),
            Err(error) => of_error(action, &error),
        };
        if !refused.renewable {
            return Err(refused);
        }
        match self.renewed(&connection).await {
            Some(newer) => request(newer.client).await.map_err(|error| of_error(action, &error)),
            None => Err(refused),
        }
    }

    /// `s3://bucket/prefix`
    pub(super) fn url(&self) -> String {
        match self.options.prefix.as_str() {
            "" => format!("s3://{}", self.options.bucket),
            prefix => format!("s3://{}/{prefix}", self.options.bucket),
        }
    }

    /// The name of an object in the bucket.
    pub(super) fn name(&self, key: &Key) -> String {
        match self.options.prefix.as_str() {
            "" => key.as_str().to_string(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    pub(super) fn error(&self, action: Action, key: Option<&Key>, refused: Refusal) -> StoreError {
        let location = match key {
            Some(key) => format!("{}/{key}", self.url()),
            None => self.url(),
        };
        let cause = match &self.options.endpoint {
            Some(endpoint) => format!("{} (endpoint {endpoint})", refused.cause),
            None => refused.cause,
        };
        let error = StoreError::new(refused.kind, action.verb(), location, cause);
        match refused.hint {
            Some(hint) => error.hinted(hint),
            None => error,
        }
    }
}

fn of_error<E: ProvideErrorMetadata + Error + 'static>(action: Action, error: &SdkError<E, HttpResponse>) -> Refusal {
    if let Some(response) = error.raw_response() {
        let header = |name| response.headers().get(name);
        let code = error.code().filter(|code| !code.is_empty());
        let body = response.body().bytes().map(|body| String::from_utf8_lossy(&body[..body.len().min(400)]));
        return refusal(
            action,
            &Answer {
                status: response.status().as_u16(),
                code,
                message: error.message(),
                request_id: header("x-amz-request-id"),
                region: header("x-amz-bucket-region"),
                location: header("location"),
                body: body.as_deref(),
            },
        );
    }
    let chain = chain(error);
    let timed_out = match error {
        SdkError::TimeoutError(_) => true,
        SdkError::DispatchFailure(failure) => failure.is_timeout(),
        _ => false,
    };
    // The chain of sources of credentials is not a type we can name: its words are.
    if ["redentials", "identity", "profile", "no providers in chain"].iter().any(|word| chain.contains(word)) {
        return no_credentials(&chain);
    }
    no_answer(&chain, timed_out)
}

/// An error with its causes, each said once.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
