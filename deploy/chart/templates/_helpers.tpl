{{- define "bellows.labels" -}}
app.kubernetes.io/name: bellows
{{- end }}

{{- define "bellows.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* The agent, as the API server knows it. */}}
{{- define "bellows.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:agent
{{- end }}

{{- define "bellows.acts" -}}
{{- if eq .Values.mode "Act" }}true{{ end -}}
{{- end }}

{{- /* Whether it moves memory requests. */}}
{{- define "bellows.requests" -}}
{{- if and .Values.requests.enabled (include "bellows.acts" .) }}true{{ end -}}
{{- end }}

{{- /* Whether it is a plugin of the runtime. */}}
{{- define "bellows.nri" -}}
{{- if and .Values.nri.enabled (include "bellows.acts" .) }}true{{ end -}}
{{- end }}

{{- /* The annotations that it writes. */}}
{{- define "bellows.originals" -}}
["bellows.dev/original-memory", "bellows.dev/original-cpu"
{{- if include "bellows.requests" . }}, "bellows.dev/original-requests"{{ end }}]
{{- end }}
